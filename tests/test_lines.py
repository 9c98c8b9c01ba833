"""A mistake in a sweep file is named with its line, one of the command line with its --set."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdexp.config import ConfigError, load
from kdexp.reading import lines_of

SOUND = """\
name: lines
data: {dataset: digits, channels: 1}
teacher:
  architecture: cnn
  epochs: 3
"""


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    """What is said of a file, without its folder."""
    file = folder / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, list(overrides))
    return [line.replace(f"{folder}/", "") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("training:\n\n  epochs: 0\n", "x.yaml, line 8: training.epochs: got 0; allowed:"),
        ("training:\n  epoch: 1\n", "x.yaml, line 7: training.epoch: unknown key; did you mean"),
        ("training: {seed: 1,\n  epochs: x}\n", "x.yaml, line 7: training.epochs: got"),
        ("student:\n  channels:\n    - 16\n    - x\n", "x.yaml, line 9: student.channels.1: got"),
        (
            "search:\n  distillation.alpha:\n    low: x\n    high: 1\n",
            "x.yaml, line 8: search.distillation.alpha.low: got",
        ),
        (
            "search:\n  distillation.alpha: {low: 0}\n",
            "x.yaml, line 7: search.distillation.alpha.high: missing",
        ),
        (
            "search:\n  distillation.alpha: {low: 0.5, high: 1.0}\n",
            "x.yaml, line 7: search.distillation.alpha: the recipe's own value",
        ),
        ("data2: 1\n", "x.yaml, line 6: data2: unknown key"),
        ("study:\n  seed: 1\n  sampler: grid\n", "x.yaml, line 8: study.sampler: a grid is"),
        ("selection:\n  goal: most_accurate\n", "x.yaml, line 7: selection.goal: most_accurate is"),
    ],
)
def test_the_line_of_a_mistake(more: str, said: str, tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, SOUND + more)
    assert line.startswith(said)


def test_a_sections_own_mistake_is_at_the_key_that_it_speaks_of(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, f"{SOUND}  epoch: 9\n")
    assert line.startswith("x.yaml, line 6: teacher: epoch must be one of the 3 epochs")


def test_each_of_several_mistakes_has_its_own_line(tmp_path: Path) -> None:
    found = mistakes(tmp_path, SOUND + "training:\n  epochs: 0\n  seed: -1\n")
    assert [line.partition(": ")[0] for line in found] == ["x.yaml, line 7", "x.yaml, line 8"]


def test_what_was_set_has_no_line(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, SOUND, "training.epochs=1", "training.epochs=0")
    assert line.startswith("--set training.epochs=0: training.epochs: got 0")
    (line,) = mistakes(tmp_path, SOUND, "teacher.epoch=9")
    assert line.startswith("--set teacher.epoch=9: teacher: epoch must be")
    (line,) = mistakes(tmp_path, SOUND, "search.distillation.alpha={low: 1}")
    assert line.startswith("--set search.distillation.alpha={low: 1}: search.distillation.alpha.h")


def test_json_has_lines_too() -> None:
    assert lines_of('{"a": 1,\n "b": {\n  "c": [1,\n 2]}}') == {
        "a": 1,
        "b": 2,
        "b.c": 3,
        "b.c.0": 3,
        "b.c.1": 4,
    }
    assert lines_of("") == {}
