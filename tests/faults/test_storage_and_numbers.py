"""Disks that are full, files that are damaged, losses that are no numbers: one clear line, nothing
lost, the study goes on.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.conftest import (
    SWEEP,
    Dies,
    Facts,
    Life,
    facts,
    no_run_is_left_open,
    statuses,
    unbroken,
    written,
)

pytestmark = pytest.mark.slow


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@dataclass(frozen=True)
class FullDisk:
    """From the n-th call of a function on, no file may grow beyond 8 kB: room for what is printed,
    and for nothing else.

    Python ignores SIGXFSZ, so that a write fails with an error as on a full disk.
    """

    where: str
    call: int

    def __call__(self) -> None:
        import importlib

        module, _, name = self.where.partition(":")
        holder = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        original, calls = getattr(holder, last), [0]

        def limiting(*args, **kwargs):
            calls[0] += 1
            if calls[0] == self.call:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
            return original(*args, **kwargs)

        setattr(holder, last, limiting)


@pytest.mark.parametrize(
    ("moment", "fault"),
    {
        "at a checkpoint": FullDisk("kdexp.distill.checkpoints:Checkpoints.save", 6),
        "at the teacher's cache": FullDisk("kdexp.distill.logits:_fill", 1),
        "at the teacher's weights": FullDisk("kdexp.distill.packs:Stacked.step", 10),
        "at a run's record": FullDisk("kdexp.runs.recording:_log_record", 2),
        "at a run's weights": FullDisk("kdexp.runs.recording:_conclude", 2),
        "at Optuna's database": FullDisk("kdexp.search.study:OpenStudy.tell", 2),
    }.items(),
)
def test_a_full_disk(place: Path, whole: Facts, moment: str, fault: FullDisk) -> None:
    end = Life(place, SWEEP, fault).end()
    assert end.code not in (0, None), end.out
    assert "Traceback" not in end.err
    assert last_line(end.err).startswith("kdexp: "), end.err
    assert not list((place / "mlruns").rglob(".*.partial")), "nothing half-written"
    again = Life(place, SWEEP).end()
    assert again.code == 0, again.err
    assert facts(place) == whole
    assert no_run_is_left_open(place)


@pytest.mark.parametrize("damaged", ["the last one", "both"])
@pytest.mark.parametrize("damage", ["one bit", "torn", "empty"])
def test_a_damaged_checkpoint(place: Path, whole: Facts, damage: str, damaged: str) -> None:
    assert (
        Life(place, SWEEP, Dies("kdexp.runs.recording:Recording.take", call=8)).end().code
        == -signal.SIGKILL
    )
    files = sorted((place / "mlruns" / "checkpoints").glob("*/*"))
    assert {path.suffix for path in files} == {".checkpoint", ".former"}
    for path in files:
        if damaged == "both" or path.suffix == ".checkpoint":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(
                {"one bit": bytes(content), "torn": bytes(content[:50]), "empty": b""}[damage]
            )
    again = Life(place, SWEEP).end()
    assert again.code == 0, again.err
    assert ("(again)" if damaged == "both" else "from epoch") in again.out
    assert facts(place) == whole
    assert no_run_is_left_open(place)


def test_a_checkpoint_of_other_code_is_not_gone_on_from(place: Path) -> None:
    assert (
        Life(place, SWEEP, Dies("kdexp.runs.recording:Recording.take", call=8)).end().code
        == -signal.SIGKILL
    )
    again = Life(place, SWEEP, OtherCode("_core")).end()
    assert again.code == 0, again.err
    assert "(again)" in again.out
    assert statuses(place)["trial", "KILLED"] == 1, "its first run stays"
    assert statuses(place)["trial", "FINISHED"] == 4


def test_a_checkpoint_outlives_edits_outside_of_the_core(place: Path, whole: Facts) -> None:
    assert (
        Life(place, SWEEP, Dies("kdexp.runs.recording:Recording.take", call=8)).end().code
        == -signal.SIGKILL
    )
    again = Life(place, SWEEP, OtherCode("_source")).end()
    assert again.code == 0, again.err
    assert "from epoch" in again.out
    assert facts(place) == whole


@dataclass(frozen=True)
class OtherCode:
    """What kdexp computes with (_core), or all of its source (_source), is another one."""

    part: str

    def __call__(self) -> None:
        import kdexp.environment

        setattr(kdexp.environment, self.part, lambda: "0123456789abcdef")


def test_a_database_that_is_locked_for_a_while_is_waited_for(place: Path, whole: Facts) -> None:
    """Both databases are locked for seconds, again and again, by somebody else."""
    life, stop = Life(place, SWEEP), threading.Event()

    def lock() -> None:
        while not stop.is_set():
            for name in ("mlflow.db", "optuna.db"):
                path = place / "mlruns" / name
                if path.exists():
                    with sqlite3.connect(path, timeout=60, isolation_level=None) as database:
                        database.execute("begin immediate")
                        time.sleep(1.5)
                        database.execute("rollback")
            time.sleep(0.3)

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        end = life.end()
    finally:
        stop.set()
        thread.join()
    assert end.code == 0, end.err
    assert facts(place) == whole


def test_stores_that_are_no_folder(place: Path) -> None:
    shutil.rmtree(place / "mlruns")
    (place / "mlruns").write_text("a file")
    end = Life(place, SWEEP).end()
    assert end.code == 1
    assert last_line(end.err).startswith("kdexp: mlruns")
    assert "Traceback" not in end.err


def test_a_loss_that_is_no_number_ends_its_trial_and_the_study_goes_on(tmp_path: Path) -> None:
    changes = {
        "training__optimizer": "sgd",
        "training__epochs": 3,
        "study__trials": 8,
        "study__sampler": "random",
        "search": {
            "training.learning_rate": {"choices": [0.01, 1e12]},
            "distillation.alpha": {"low": 0.0, "high": 1.0},
        },
        "selection__accuracy_bar": 0.05,
    }
    for pack in ("1", "4"):
        place = written(tmp_path / pack, **changes)
        end = Life(place, [*SWEEP, "--pack", pack]).end()
        assert end.code == 0, end.err
        assert "diverged after 1 epochs" in end.out
        with sqlite3.connect(place / "mlruns" / "mlflow.db") as mlflow:
            tags = mlflow.execute("select run_uuid, key, value from tags").fetchall()
        states = {run: value for run, key, value in tags if key == "kdexp.state"}
        bad = {run: int(value) for run, key, value in tags if key == "kdexp.bad_step"}
        assert set(bad) == {run for run, state in states.items() if state == "diverged"}
        assert bad
        assert all(1 <= step <= 20 for step in bad.values())
        assert statuses(place)["trial", "FINISHED"] == 8
        assert no_run_is_left_open(place)


NETS = """
import torch
from torch import nn

def fragile(channels, image_size, classes, width):
    return Fragile(channels * image_size[0] * image_size[1], classes, width)

class Fragile(nn.Module):
    def __init__(self, inputs, classes, width):
        super().__init__()
        self.one, self.two, self.width = nn.Linear(inputs, width), nn.Linear(width, classes), width
    def forward(self, x):
        if self.width == 13 and self.training:
            {fails}
        return self.two(torch.relu(self.one(x.flatten(1))))
"""
FAILURES = {
    "an error of its own": (
        'raise RuntimeError("thirteen brings bad luck")',
        "thirteen brings bad luck",
    ),
    "no memory": ("torch.empty(10**15)", "can't allocate memory"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_trial_that_breaks_is_given_up_after_its_retries_and_the_study_goes_on(
    tmp_path: Path, failure: str
) -> None:
    code, message = FAILURES[failure]
    changes = {
        "student": {"architecture": "nets:fragile", "options": {"width": 8}},
        "search": {
            "student.options.width": {"choices": [8, 13, 21]},
            "distillation.alpha": {"low": 0.0, "high": 1.0},
        },
        "study__sampler": "random",
        "study__trials": 8,
        "study__retries": 2,
        "selection__accuracy_bar": 0.05,
    }
    place = written(tmp_path / "place", **changes)
    (place / "nets.py").write_text(NETS.format(fails=code))
    end = Life(place, SWEEP).end()
    assert end.code == 0, end.err
    assert "Selected: trial" in end.out
    assert "broke 3 times without getting on (study.retries: 2)" in end.out
    assert message in end.out
    assert "Traceback" not in end.err
    with sqlite3.connect(place / "mlruns" / "optuna.db") as optuna:
        states = [state for (state,) in optuna.execute("select state from trials order by number")]
    assert states.count("FAIL") >= 1
    assert states.count("FAIL") + states.count("COMPLETE") == 8
    assert statuses(place)["trial", "FAILED"] == 3 * states.count("FAIL"), (
        "each try has its run, with its reason"
    )
    assert no_run_is_left_open(place)


def wait_for(condition: Callable[[], object], life: Life) -> None:
    """While the command is under way."""
    while not condition():
        assert life.process.is_alive(), "it came to its end before"
        time.sleep(0.01)


def test_runs_that_were_resumed_are_reproduced_bit_for_bit(tmp_path: Path) -> None:
    """From one worker, from two, and from a pack."""
    for name, extra in {
        "one": ["--workers", "1"],
        "two": ["--workers", "2"],
        "pack": ["--workers", "1", "--pack", "4"],
    }.items():
        changes = {"training__epochs": 25, "study__retries": 100}
        place = written(tmp_path / name, **changes)
        command = ["sweep", "tiny.yaml", "--threads", "1", *extra]
        life = Life(place, command)
        wait_for(lambda: list((place / "mlruns" / "checkpoints").glob("*/*.former")), life)  # noqa: B023
        life.kill()
        life.process.join()
        end = Life(place, command).end()
        assert end.code == 0, end.err
        with sqlite3.connect(place / "mlruns" / "mlflow.db") as mlflow:
            query = "select run_uuid from tags where key = 'kdexp.resumed_from_epoch' and value > 0"
            resumed = [run for (run,) in mlflow.execute(query)]
        assert resumed, end.out
        again = Life(place, ["reproduce", resumed[0]]).end()
        assert again.code == 0, again.err
        assert "identical: " in again.out


def test_two_sweeps_that_start_at_the_same_moment_train_every_trial_once(tmp_path: Path) -> None:
    changes = {"training__epochs": 4, "study__sampler": "random", "study__trials": 6}
    expected = unbroken(tmp_path / "whole", **changes)
    place = written(tmp_path / "place", **changes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny.yaml").write_text((place / "tiny.yaml").read_text())
    lives = [
        Life(place, SWEEP),
        Life(tmp_path / "other", [*SWEEP, "--stores", str(place / "mlruns")]),
    ]
    ends = [life.end() for life in lives]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert facts(place) == expected
    assert no_run_is_left_open(place)
