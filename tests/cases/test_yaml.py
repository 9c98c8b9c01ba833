"""Sweep files as people and programs write them: read as they mean it, or refused in one line."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cases.conftest import TINY
from kdexp.config import ConfigError, flatten, load


def written(folder: Path, content: bytes | str, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The one line in which a file is refused."""
    with pytest.raises(ConfigError) as error:
        load(path, list(overrides))
    assert len(str(error.value).splitlines()) == 1, str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "value"),
    {
        "selection.limit=1e5": 100_000,
        "selection.limit=100_000": 100_000,
        "selection.limit=1.0e5": 100_000,
        "study.trials=1e1": 10,
        "training.seed=0x10": 16,
        "training.seed=0b11": 3,
        "training.seed=0": 0,
        "training.seed=-0": 0,
        "training.learning_rate=.5e-3": 5e-4,
        "training.learning_rate=1.e-3": 1e-3,
        "training.learning_rate=1E-3": 1e-3,
        "training.learning_rate=1e-3": 1e-3,
        "training.batch_size=64.0": 64,
        "training.max_steps=~": None,
        "training.max_steps=null": None,
        "training.max_steps=1e3": 1000,
        "data.augment.flip=yes": True,
        "name=2026": "2026",
        "name='010'": "010",
        "student.channels=[4, 8]": [4, 8],
    }.items(),
)
def test_a_number_is_read_as_people_mean_it(tmp_path: Path, override: str, value: Any) -> None:
    found = flatten(
        load(written(tmp_path, TINY), ["search.student.hidden={low: 16, high: 32}", override])
    )
    assert found[override.partition("=")[0]] == value
    assert type(found[override.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("override", "says"),
    {
        "training.seed=010": ["octal, 8", "write 10 or 8", "line 1, column 1"],
        "training.seed=0123": ["octal, 83", "write 123"],
        "training.batch_size=064": ["octal, 52"],
        "training.batch_size=-010": ["octal, -8"],
        "training.batch_size=089": ['got "089"', "a whole number, at least 2"],
        "training.batch_size=0o100": ['got "0o100"', "a whole number"],
        "distillation.temperature=1:30": ["base of 60, 90", "quote it"],
        "distillation.temperature=1:30.5": ["base of 60, 90.5"],
        "name=12:30": ["base of 60", "quote it for text"],
        "selection.limit=100,000": ['got "100,000"', "a whole number, at least 1, or null"],
        "training.learning_rate=1e-3_0": ['got "1e-3_0"', "a number"],
        "selection.accuracy_bar=92%": ['got "92%"', "a number, at least 0, at most 1"],
        "study.pruner=off": ["got false (YAML reads no and off so; quote it", "none"],
        "study.sampler=no": ["got false"],
        "study.pruner=None": ["did you mean none?"],
        "training.max_steps=None": ['got "None"', "or null"],
        "training.max_steps=1.5": ["got 1.5", "a whole number"],
        "data.augment.flip='yes'": ['got "yes"', "true or false"],
        "training.seed=1" + 4000 * "0": ["a number of 4,001 digits"],
        "training.seed=0x" + 4000 * "f": ["a number of 4,002 digits"],
        "training.seed=1e400": ["got not a number", "a whole number"],
        "student={architecture: 'nets:mlp', options: {width: null}}": [
            "student.options.width: got null; allowed: text, a number, or true or false"
        ],
        "student={architecture: 'nets:mlp', options: {dims: [1, 2]}}": [
            "student.options.dims: got [1, 2]; allowed: text"
        ],
        "search.student.hidden={choices: [8, 16], low: 3}": [
            "search.student.hidden: holds choices and low",
            "choices alone",
        ],
        "search.distillation.alpha={choices: [[0.1]]}": [
            "search.distillation.alpha.choices.0: got [0.1]; allowed: text, a num"
        ],
        "search.distillation.alpha={low: x, high: 1}": [
            'search.distillation.alpha.low: got "x"; allowed: a number'
        ],
        "search.student.channels={choices: [[4], {a: 1}]}": [
            "search.student.channels.choices.1",
            "got {",
        ],
        "training={{ training }}": ["template's placeholder", "line 1"],
        'study={"seed\u00a0": 1}': ["no-break space (U+00A0)", "write seed"],
        "study={\u200bseed: 1}": ["zero width space (U+200B)", "write seed"],
        "training.epochs='5\u00a0'": ["\\u00a0", "a whole number"],
        "name=“tiny”": ["letters, digits and signs", 'holds "“”"', "--set name=tiny"],
        "name=a/b": ["letters, digits and signs", "--set name=a-b"],
    }.items(),
)
def test_what_is_not_meant_is_one_line(tmp_path: Path, override: str, says: list[str]) -> None:
    line = refused(written(tmp_path, TINY), override)
    for part in says:
        assert part in line
    for noise in ("pydantic", "Tuple", "tuple[", "valid integer", ".bool", ".int", "String should"):
        assert noise not in line


def test_two_mistakes_are_two_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(
            written(tmp_path, TINY),
            ["search.distillation.alpha={choices: [[0.1, 0.2], [0.3]]}", "training.epochs=x"],
        )
    assert len(str(error.value).splitlines()) == 3, "the two choices, and the epochs"


def test_whole_numbers_in_a_search_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    sweep = load(
        written(tmp_path, TINY), ["search.student.hidden={low: 1e1, high: 1e2, step: 2.0}"]
    )
    assert [
        type(value)
        for value in (sweep.search["student.hidden"].low, sweep.search["student.hidden"].step)
    ] == [
        int,
        int,
    ]  # type: ignore[union-attr]
    assert "1.5" in refused(written(tmp_path, TINY), "search.student.hidden={low: 1.5, high: 32}")
    rates = load(
        written(tmp_path, TINY), ["search.distillation.temperature={low: 1.0, high: 1e1}"]
    ).search
    assert type(rates["distillation.temperature"].high) is float  # type: ignore[union-attr]


FILES = {
    "a byte order mark": b"\xef\xbb\xbf" + TINY.encode(),
    "CRLF": TINY.replace("\n", "\r\n").encode(),
    "UTF-16": TINY.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + TINY.encode("utf-16-be"),
    "no end of line": TINY.rstrip().encode(),
    "a byte order mark and CRLF": b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_program_is_read(tmp_path: Path, kind: str) -> None:
    assert load(written(tmp_path, FILES[kind], "other.yaml")) == load(written(tmp_path, TINY))


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "# f\udcfcr alle\n" + TINY: "line 1 is not UTF-8; save it as UTF-8",
        TINY + "# \udcff\n": "line 11 is not UTF-8",
        TINY + "teacher:\n\tx: 1\n": "line 12, column 1); indent by spaces, not by tabs",
        TINY + "---\n" + TINY: (
            "expected a single document in the stream but found another document (line 11"
        ),
        TINY.replace(
            "epochs: 2}", "epochs: {{ epochs }}}", 1
        ): "{{ … }} is a template's placeholder; put the value in its place (line 5",
        TINY + "teacher: {epochs: 1}\n": 'key "teacher" stands twice (line 11, column 1)',
        TINY + 'x: {1: a, "1": b}\n': 'key 1 is not text; write "1" (line 11, column 5)',
        TINY + 'x: {yes: a, "True": b}\n': (
            'key true (YAML reads yes so) is not text; write "yes" (line 11, column 5)'
        ),
        TINY + "x: {null: a}\n": "key null is not text",
        TINY + "x: {2026-01-01: a}\n": "is not text",
        TINY + "x: \0\n": "a character U+0000 in line 11",
        TINY.replace(
            "trials: 3", "seed: 010"
        ): "as octal, 8; write 10 or 8, or quote it where text is meant (line 9, column 15)",
    }.items(),
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(
    tmp_path: Path, content: str, says: str
) -> None:
    line = refused(written(tmp_path, content.encode("utf-8", "surrogateescape")))
    assert says in line


def test_a_sweep_file_may_come_by_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(TINY))
    writer.start()
    assert load(pipe) == load(written(tmp_path, TINY))
    writer.join()


@pytest.mark.parametrize("name", [".yaml", "-tiny.yaml", "it's.yaml"])
def test_a_files_name_that_is_no_studys_is_refused_in_words(tmp_path: Path, name: str) -> None:
    line = refused(written(tmp_path, TINY.replace("name: tiny\n", ""), name))
    assert "letters, digits and signs" in line
    assert "name: … in the file, or --set name=" in line


@pytest.mark.parametrize(
    "name", ["tiny copy.yaml", "tiny – Kopie.yaml", "(x).yaml", "#1.yaml", "tiny.v2.yaml", "_x.yml"]
)
def test_a_files_name_may_be_the_studys(tmp_path: Path, name: str) -> None:
    assert load(written(tmp_path, TINY.replace("name: tiny\n", ""), name)).name == Path(name).stem
