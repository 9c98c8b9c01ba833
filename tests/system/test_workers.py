"""One command with several workers: they share the work, outlive one another, and stop with the one
that started them.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from conftest import until

from system.conftest import command, environment, runs, started, trials

pytestmark = pytest.mark.usefixtures("migrated")

RESUMED = re.compile(r"\(again\)|\(from epoch \d+\)")


def children(pid: int) -> list[int]:
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]


def workers_of(process: subprocess.Popen) -> list[int]:
    """The workers are forked from a server that the command has started."""
    return [worker for server in children(process.pid) for worker in children(server)]


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" in status.read_text()
    except OSError:
        return True


def both_train(process: subprocess.Popen, folder: Path) -> list[int]:
    """Wait until two workers have a trial each; their process ids."""
    until(
        lambda: runs(folder, "trial")["RUNNING"] == 2 or process.poll() is not None,
        "two trials under way",
        120,
    )
    assert process.poll() is None, process.communicate()
    workers = workers_of(process)
    assert len(workers) == 2
    return workers


def run_names(folder: Path) -> dict[str, str]:
    """Run IDs of the finished trials by name."""
    query = "select name, run_uuid from runs where name like 'trial %' and status = 'FINISHED'"
    with sqlite3.connect(folder / "mlruns" / "mlflow.db", timeout=60) as database:
        return dict(database.execute(query).fetchall())


def test_two_workers_finish_a_study_together_and_a_run_of_theirs_is_reproduced(
    tiny_file: Path, tmp_path: Path
) -> None:
    own_choice = {
        key: value for key, value in environment().items() if not key.startswith("KDEXP_")
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=own_choice,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Two threads at most for the command itself, whatever the machine: one for each worker.
    own_choice["OMP_NUM_THREADS"] = "2"
    out = run("sweep", "tiny.yaml", "--trials", "6", "--workers", "2")
    assert "2 workers, 1 thread each" in out
    assert "Selected: trial" in out
    assert sorted(
        int(number) for number in re.findall(r"^trial (\d+) .* parameters ", out, re.MULTILINE)
    ) == list(range(6))
    assert trials(tmp_path) == dict.fromkeys(range(6), 1)
    assert {kind: runs(tmp_path, kind) for kind in ("study", "teacher", "trial")} == {
        "study": {"FINISHED": 1},
        "teacher": {"FINISHED": 1},
        "trial": {"FINISHED": 6},
    }
    names = run_names(tmp_path)
    assert {"trial 0 · documented defaults", "trial 1 · labels only"} < names.keys()
    again = run("reproduce", names["trial 3"])
    assert "identical: 18 metric values" in again
    assert not list((tmp_path / "mlruns" / "optuna.db-claims").glob("*@*.lock"))


@pytest.mark.slow
def test_four_workers_do_not_lock_one_another_out_of_the_databases(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    done = kdexp(
        "sweep",
        "tiny.yaml",
        "--workers",
        "4",
        "--trials",
        "16",
        "--set",
        "training.epochs=1",
        timeout=400,
    )
    assert "4 workers" in done.stdout, done.stderr
    assert "ended" not in done.stdout
    assert trials(tmp_path) == dict.fromkeys(range(16), 1)
    assert runs(tmp_path, "trial") == {"FINISHED": 16}


def test_when_a_worker_is_killed_the_other_takes_its_trial_even_the_last(
    tiny_file: Path, tmp_path: Path
) -> None:
    process = started(tmp_path, "--trials", "2", "--workers", "2")
    victim, _ = both_train(process, tmp_path)
    os.kill(victim, signal.SIGKILL)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert re.search(r"worker [12] ended in trial [01]: killed by SIGKILL", out)
    (how,) = RESUMED.findall(out)
    assert "Selected: trial" in out
    assert trials(tmp_path) == {0: 1, 1: 1}
    anew = {"KILLED": 1} if how == "(again)" else {}  # a trial that goes on keeps its run
    assert runs(tmp_path, "trial") == {"FINISHED": 2, **anew}
    assert runs(tmp_path, "study") == {"FINISHED": 1}


@pytest.mark.slow
def test_when_all_workers_are_killed_the_command_says_so_and_continues_later(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    process = started(tmp_path, "--trials", "3", "--workers", "2")
    for worker in both_train(process, tmp_path):
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("kdexp: 3 trials of study 'tiny' are not finished: worker ")
    assert line.count("killed by SIGKILL") == 2
    assert "Continue with the same command: kdexp sweep tiny.yaml" in line
    assert runs(tmp_path, "study") == {"KILLED": 1}
    again = kdexp("sweep", "tiny.yaml", "--set", "training.epochs=40", "--trials", "3")
    assert again.returncode == 0, again.stderr
    assert trials(tmp_path) == dict.fromkeys(range(3), 1)
    assert runs(tmp_path, "trial")["RUNNING"] == 0


def test_workers_stop_by_themselves_when_their_parent_is_killed(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    process = started(tmp_path, "--trials", "6", "--workers", "2")
    workers = both_train(process, tmp_path)
    process.kill()
    process.communicate()
    until(lambda: all(gone(worker) for worker in workers), "workers without a parent stop", 30)
    again = kdexp(
        "sweep", "tiny.yaml", "--set", "training.epochs=40", "--trials", "6", "--workers", "2"
    )
    assert again.returncode == 0, again.stderr
    assert len(RESUMED.findall(again.stdout)) == 2
    assert trials(tmp_path) == dict.fromkeys(range(6), 1)
    assert runs(tmp_path, "trial")["RUNNING"] == 0
    assert not list((tmp_path / "mlruns" / "optuna.db-claims").glob("*@*.lock"))


@pytest.mark.parametrize(
    "how",
    [
        "Ctrl-C in the terminal",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("SIGINT to the command", "SIGTERM to all")
        ),
    ],
)
def test_stopping_the_command_stops_its_workers(
    kdexp, tiny_file: Path, tmp_path: Path, how: str
) -> None:
    process = started(tmp_path, "--trials", "6", "--workers", "2")
    workers = both_train(process, tmp_path)
    {
        "Ctrl-C in the terminal": lambda: os.killpg(process.pid, signal.SIGINT),
        "SIGINT to the command": lambda: process.send_signal(signal.SIGINT),
        "SIGTERM to all": lambda: os.killpg(process.pid, signal.SIGTERM),
    }[how]()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (line,) = errors.splitlines()
    assert line.startswith("kdexp: Stopped; finished trials are kept")
    assert "kdexp sweep tiny.yaml --set training.epochs=40 --trials 6 --workers 2" in line
    until(lambda: all(gone(worker) for worker in workers), "workers stop", 30)
    assert runs(tmp_path, "trial")["RUNNING"] == 0
    assert runs(tmp_path, "study") == {"KILLED": 1}
    if how == "Ctrl-C in the terminal":
        again = kdexp(
            "sweep", "tiny.yaml", "--set", "training.epochs=40", "--trials", "6", "--workers", "2"
        )
        assert again.returncode == 0, again.stderr
        assert len(RESUMED.findall(again.stdout)) == 2
        assert trials(tmp_path) == dict.fromkeys(range(6), 1)
        assert runs(tmp_path, "study") == {"FINISHED": 1}


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tiny_file: Path, tmp_path: Path) -> None:
    process = started(tmp_path, "--trials", "6", "--workers", "2")
    workers = both_train(process, tmp_path)
    os.kill(workers[0], signal.SIGSTOP)  # one that cannot stop by itself
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    until(lambda: all(gone(worker) for worker in workers), "workers are gone", 10)


DEAF = """
import time
from torch import nn

class Deaf(nn.Flatten):
    def forward(self, images):
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:  # as a library's callback, or a __del__, may come upon it
            pass
        return super().forward(images)

def mlp(channels, image_size, classes, width):
    return nn.Sequential(Deaf(), nn.Linear(channels * image_size[0] * image_size[1], width), nn.Linear(width, classes))
"""


def test_a_worker_stops_whose_interrupt_came_to_nothing(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(DEAF)
    network = [
        "--set", "student={architecture: 'nets:mlp', options: {width: 8}}",
        "--set", "search={student.options.width: {choices: [4, 8]}}",
    ]  # fmt: skip
    process = started(tmp_path, *network, "--trials", "6", "--workers", "2")
    workers = both_train(process, tmp_path)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    until(lambda: all(gone(worker) for worker in workers), "workers are gone", 10)


FAILS = """
import errno, multiprocessing, os
from torch import nn

class Logs(nn.Flatten):  # to a file, now and then
    steps = 0

    def forward(self, images):
        self.steps += self.training
        if self.steps == 20 and multiprocessing.parent_process():
            %s
        return super().forward(images)

def mlp(channels, image_size, classes, width):
    return nn.Sequential(Logs(), nn.Linear(channels * image_size[0] * image_size[1], width), nn.Linear(width, classes))
"""
ONCE = """try:
                os.close(os.open("failed", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"""


@pytest.mark.parametrize("times", ["once", pytest.param("always", marks=pytest.mark.slow)])
def test_a_worker_that_fails_is_named_with_its_reason(
    kdexp, tiny_file: Path, tmp_path: Path, times: str
) -> None:
    always = "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    (tmp_path / "nets.py").write_text(FAILS % (ONCE if times == "once" else always))
    network = [
        "--set", "student={architecture: 'nets:mlp', options: {width: 8}}",
        "--set", "search={student.options.width: {choices: [4, 8]}, distillation.alpha: {low: 0.0, high: 1.0}}",
    ]  # fmt: skip
    done = kdexp("sweep", "tiny.yaml", *network, "--workers", "2", "--trials", "4")
    assert re.search(r"worker [12] ended in trial \d: .*No space left on device", done.stdout), (
        done.stderr
    )
    assert "Traceback" not in done.stdout + done.stderr
    if times == "once":
        assert done.returncode == 0, done.stderr
        assert "Selected: trial" in done.stdout
        assert trials(tmp_path) == dict.fromkeys(range(4), 1)
    else:
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert re.search(
            r"4 trials of study 'tiny' are not finished: worker \d ended in trial \d: .*No space"
            r" left",
            line,
        )
        assert line.count("No space left on device") == 2
