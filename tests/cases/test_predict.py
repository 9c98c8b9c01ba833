"""predict and benchmark as people type them: the answers on the screen and in a file, and exit codes
that a script can rely on.
"""

from __future__ import annotations

import csv
import re

import pytest

from cases.conftest import Case, one_line


@pytest.fixture
def student(case: Case) -> str:
    """The run ID of a student of the image folder data/shots."""
    case.own()
    case.pictures(count=12)
    done = case.kd("train", "own.yaml")
    assert done.returncode == 0, done.stderr
    return re.search(r"Run ID: +(\w+)", done.stdout)[1]


def test_images_get_names_and_what_is_broken_is_said(case: Case, student: str) -> None:
    new = case.pictures("new ones/größer", count=1)
    (new / "digit 0" / "torn one.jpg").write_bytes(b"\xff\xd8\xff")
    done = case.kd("predict", student, "new ones", "--out", "answers/p.csv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with (case.folder / "answers" / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        f"new ones/größer/digit {digit}/000.png" for digit in (0, 1, 7)
    ]
    for row in rows:
        assert row["label"] in ("digit 0", "digit 1", "digit 7")
        assert f"{row['path']}  {row['label']}  " in done.stdout
    assert "not read  new ones/größer/digit 0/torn one.jpg is " in done.stdout
    assert "Images:   3, 1 not read\n" in done.stdout
    assert "Written:  answers/p.csv, 3 rows" in done.stdout


def test_where_nothing_can_be_read_the_command_fails_and_writes_nothing(
    case: Case, student: str
) -> None:
    case.write("torn.png", "no image")
    failed = case.kd("predict", student, "torn.png", "--out", "p.csv")
    one_line(failed, "None of 1 images can be read: torn.png is no image")
    assert not (case.folder / "p.csv").exists()
    one_line(case.kd("predict", student, "nowhere"), "nowhere: No such file or directory")
    one_line(case.kd("predict", student), "Missing argument 'PATHS...'")
    one_line(case.kd("predict", student, "data", "--out", "data"), "is a folder; name a file")


def test_a_floor_ends_the_command_with_an_exit_code(case: Case, student: str) -> None:
    done = case.kd("benchmark", student, "--floor", "0.01")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.findall(r"^(as trained|float32|float16|int8) ", done.stdout, re.MULTILINE) == [
        "as trained",
        "float32",
        "float16",
        "int8",
    ]
    failed = case.kd("benchmark", student, "--floor", "1", "--form", "int8")
    assert "int8 " in failed.stdout, "the table comes first"
    if "Chosen:   int8: val accuracy 100.00 %" not in failed.stdout:
        one_line(failed, f"Run {student}: int8 has ", "below --floor 100.00%")
    one_line(case.kd("benchmark", student, "--form", "int4"), "int4")
    one_line(case.kd("benchmark", student, "--floor", "92"), "--floor")
