"""A command ends in time, with nothing lost."""

from __future__ import annotations

import time

import pytest
from conftest import CPU, drain, tiny_sweep

from kdexp import KdexpError
from kdexp.deadline import RESERVE, Deadline, seconds_of
from kdexp.runs.tracking import Tracking
from kdexp.search.scheduler import NoMore
from kdexp.search.sweep import TrialFinished, TrialStarted, run_sweep
from kdexp.settings import Settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13_800),
        ("90m", 5_400),
        ("45s", 45),
        ("1d 6h", 108_000),
        ("1.5h", 5_400),
        (" 2m ", 120),
    ],
)
def test_a_length_of_time_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "3x", "h", "3h50", "-1h", "3 hours", "1e3s"])
def test_what_is_no_length_of_time_is_said(text: str) -> None:
    with pytest.raises(KdexpError, match="no length of time; give one such as 3h50m"):
        seconds_of(text)


def test_a_slurm_jobs_own_end_counts_unless_a_time_is_given() -> None:
    job = {"SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    assert Deadline.of(None, job).left == pytest.approx(600 - RESERVE, abs=2)
    assert Deadline.of("20s", job).left == pytest.approx(20, abs=1)
    assert Deadline.of(None, {}).left == float("inf")
    assert Deadline.of(None, {"SLURM_JOB_END_TIME": "Unknown"}).left == float("inf")


def test_when_the_time_is_up_the_main_thread_is_interrupted_and_not_after_that() -> None:
    begun = time.monotonic()
    for seconds in (0.2, -1):
        with pytest.raises(KeyboardInterrupt), Deadline(seconds).kept():
            time.sleep(60)
    assert time.monotonic() - begun < 10, "also where it sleeps"
    with Deadline(0.3).kept():
        pass
    with Deadline(None).kept():
        time.sleep(0.5)


class Nearly(Deadline):
    """Nearly up, once somebody says so."""

    up = False

    @property
    def left(self) -> float:
        return 0.0 if self.up else 1e9


def test_nothing_is_begun_that_would_reach_no_checkpoint(
    settings: Settings, tracking: Tracking
) -> None:
    deadline, seen = Nearly(None), []
    with pytest.raises(NoMore, match="2 trials of study 'tiny' are left, and the time is") as end:
        for event in run_sweep(tiny_sweep(), settings, tracking, CPU, deadline):
            seen.append(event)
            deadline.up = (isinstance(event, TrialStarted) and event.number == 1) or deadline.up
    assert end.value.late
    assert [event.number for event in seen if isinstance(event, TrialFinished)] == [0, 1]
    assert tracking.study("tiny").status == "KILLED"
    again, others = drain(run_sweep(tiny_sweep(), settings, tracking, CPU))
    assert others == 0
    assert [event.number for event in again if isinstance(event, TrialFinished)] == [2, 3]
