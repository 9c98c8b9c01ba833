"""The commands end to end, each in a process of its own."""

from __future__ import annotations

import re
import shutil
import sqlite3
from pathlib import Path

from system.conftest import runs, trials


def run_id(output: str) -> str:
    return re.findall(r"Run ID: +([0-9a-f]{32})", output)[-1]


def test_sweep_select_and_reproduce_from_a_second_process(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    swept = kdexp("sweep", "tiny.yaml")
    assert swept.returncode == 0, swept.stderr
    assert "Selected: trial" in swept.stdout
    assert re.search(
        r"test accuracy \d+\.\d\d % \(95 % interval \d+\.\d\d to \d+\.\d\d %, 359 images",
        swept.stdout,
    )
    assert "Distillation: trial 0 (documented defaults) over trial 1 (labels only)" in swept.stdout
    selected = run_id(swept.stdout)
    assert f"kdexp reproduce {selected}" in swept.stdout
    assert trials(tmp_path) == {0: 1, 1: 1, 2: 1, 3: 1}

    most = kdexp("select", "tiny", "--bar", "0", "--most-accurate", "--limit", "1000000")
    assert most.returncode == 0, most.stderr

    other = next(
        line.split()[-1]
        for line in swept.stdout.splitlines()
        if re.search(r"[0-9a-f]{32}$", line) and selected not in line
    )
    for run in (selected, other):
        again = kdexp("reproduce", run)
        assert again.returncode == 0, again.stderr
        assert "identical: 18 metric values and the SHA-256 of the weights" in again.stdout
    assert runs(tmp_path, "reproduction") == {"FINISHED": 2}


def test_confirm_finds_in_a_second_process_what_a_first_has_trained(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    swept = kdexp("sweep", "tiny.yaml", "--trials", "2")
    assert "kdexp confirm tiny" in swept.stdout, swept.stderr
    first, second = (
        kdexp("confirm", "tiny", "--bar", "0.01", "--seeds", "2", "--confidence", "0.6")
        for _ in range(2)
    )
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert re.search(r"confirmed \(≥ 1\.00 % at 60 %\)", done.stdout)
        assert re.search(
            r"test accuracy \d+\.\d\d % ± \d+\.\d\d over 2 fresh seeds \(359 images", done.stdout
        )
    assert "trained before" not in first.stdout
    assert second.stdout.count("trained before") == 2
    assert runs(tmp_path, "confirmation") == {"FINISHED": 2}
    none = kdexp("confirm", "tiny", "--bar", "1")
    assert none.returncode == 1
    assert none.stderr.startswith(
        "kdexp: No student of study 'tiny' reaches validation accuracy 1. Best:"
    )


def test_train_and_teacher(kdexp_here, tiny_file: Path, tmp_path: Path) -> None:
    teacher = kdexp_here("teacher", "tiny.yaml")
    assert teacher.returncode == 0, teacher.stderr
    assert "3 epochs cached" in teacher.stdout
    trained = kdexp_here(
        "train", "tiny.yaml", "--set", "training.epochs=2", "--set", "distillation.temperature=2"
    )
    assert trained.returncode == 0, trained.stderr
    assert "epoch 2/2" in trained.stdout
    assert runs(tmp_path, "teacher") == {"FINISHED": 1}
    again = kdexp_here("reproduce", run_id(trained.stdout))
    assert "identical: 12 metric values" in again.stdout, again.stderr


def test_nothing_that_a_command_writes_lies_outside_its_stores(
    kdexp_here, tiny_file: Path, tmp_path: Path
) -> None:
    assert (
        kdexp_here("sweep", "tiny.yaml", "--stores", "elsewhere", "--trials", "2").returncode == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "elsewhere"}
    with sqlite3.connect(tmp_path / "elsewhere" / "mlflow.db") as database:
        (place,) = database.execute(
            "select artifact_location from experiments where name = 'tiny'"
        ).fetchone()
    assert place.startswith((tmp_path / "elsewhere").as_uri())


def test_every_command_has_help(kdexp) -> None:
    root = kdexp("--help").stdout
    for name in ("sweep", "train", "teacher", "select", "confirm", "reproduce", "ui"):
        assert f"\n  {name} " in root
        helped = kdexp(name, "--help")
        assert helped.returncode == 0
        assert "Usage: kdexp" in helped.stdout


def test_a_copy_of_the_databases_alone_holds_all_that_a_sweep_recorded(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    done = kdexp("sweep", "tiny.yaml", "--trials", "2")
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copy"
    (copy / "mlruns").mkdir(parents=True)
    shutil.copy(tmp_path / "mlruns" / "mlflow.db", copy / "mlruns")
    assert runs(copy, "trial") == {"FINISHED": 2}
