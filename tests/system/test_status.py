"""kdexp status: how a study stands, as another command sees it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from conftest import until

from kdexp.runs.tracking import Tracking
from kdexp.select.status import Status, in_words, status
from kdexp.settings import Settings
from system.conftest import runs, started, trials, wait_for_trial


def test_it_says_who_is_at_work_and_after_a_kill_who_is_not(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    settings = Settings(stores=tmp_path / "mlruns")

    def stands() -> Status:
        tracking = Tracking(settings, make=False)
        return status(tracking.study("tiny"), settings, tracking)

    process = started(tmp_path, "--set", "training.epochs=90")
    wait_for_trial(process, 0)
    until(lambda: stands().at_work, "the next trial begins", 60)
    one = stands()
    done = sum(one.ended.values())
    assert (one.state, one.commands, one.budget) == ("running", 1, 4)
    assert 1 <= done < 4
    assert [(each.trial, each.alive) for each in one.at_work] == [(done, True)]
    assert one.seconds_left == one.seconds_a_trial * (4 - done) > 0
    said = in_words([one])
    assert f"study     tiny: {done} of 4 trials ended ({done} complete)" in said
    assert f"at work   1 command: trial {done}" in said
    assert "left, " in said

    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = trials(tmp_path)
    one = stands()
    assert (one.state, one.commands, one.seconds_left) == ("waiting", 0, None)
    assert [each.alive for each in one.at_work] == [False]
    said = kdexp("status").stdout
    assert "left      trial" in said
    assert "nobody is at it: the same kdexp sweep goes on with it" in said
    assert trials(tmp_path) == before, "nothing is written"

    assert kdexp("sweep", "tiny.yaml", "--set", "training.epochs=90").returncode == 0
    (found,) = json.loads(kdexp("status", "tiny", "--json").stdout)
    assert (found["state"], found["ended"], found["at_work"]) == ("finished", {"complete": 4}, [])
    assert "nothing is left to train: kdexp select tiny" in kdexp("status", "tiny").stdout
    assert kdexp("status").stdout.startswith("No study is under way")
    assert kdexp("status", "tiny", "--watch").returncode == 0, "it ends with the study"


def test_a_study_whose_search_is_elsewhere_is_said(kdexp, tiny_file: Path, tmp_path: Path) -> None:
    assert kdexp("sweep", "tiny.yaml", "--trials", "2").returncode == 0
    (tmp_path / "mlruns" / "optuna.db").rename(tmp_path / "elsewhere.db")
    done = kdexp("status", "tiny")
    assert done.returncode == 1
    assert "does not know study 'tiny' of run" in done.stderr
    assert "--storage" in done.stderr
    assert not (tmp_path / "mlruns" / "optuna.db").exists()
    there = kdexp("status", "tiny", "--storage", "sqlite:///elsewhere.db")
    assert "2 of 2 trials ended" in there.stdout


def test_a_study_is_asked_to_stop_and_ends_what_it_trains(
    kdexp, tiny_file: Path, tmp_path: Path
) -> None:
    process = started(tmp_path, "--set", "training.epochs=60")
    wait_for_trial(process, 0)
    done = kdexp("stop", "tiny")
    assert done.returncode == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "are left, and kdexp stop has asked for it. Continue with the same command" in errors
    ended = runs(tmp_path, "trial")
    assert set(ended) == {"FINISHED"}, "none is broken off"
    assert 1 <= ended["FINISHED"] < 4
    assert kdexp("sweep", "tiny.yaml", "--set", "training.epochs=60").returncode == 0
    assert trials(tmp_path) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert "Nobody is at study tiny" in kdexp("stop", "tiny").stdout


def test_a_sweep_ends_in_time_with_a_code_of_its_own(
    kdexp, tiny_file: Path, tmp_path: Path, monkeypatch
) -> None:
    done = kdexp("sweep", "tiny.yaml", "--until", "1s")
    assert done.returncode == 75
    assert done.stderr.startswith("kdexp: The time is up; finished trials are kept")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    assert kdexp("sweep", "tiny.yaml").returncode == 75
    wrong = kdexp("sweep", "tiny.yaml", "--until", "soon")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (1, 1)
