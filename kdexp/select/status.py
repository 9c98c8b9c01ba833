"""How a study stands, seen from anywhere that reaches its stores: how far it is, who is at it, what
is sure so far, how long it takes yet; and how it is asked to stop.

A command of which nothing is heard may be gone, or cut off from the storage; on a server those who
train take half a minute to be sure of that (`kdexp.search.claims`).
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from kdexp.config import Size
from kdexp.runs.describe import duration
from kdexp.runs.records import FOLDS
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.search.claims import Claimant
from kdexp.search.objective import Passing
from kdexp.search.study import OpenStudy, UnderWay, study_there
from kdexp.select.promote import sweep_of
from kdexp.settings import Settings

__all__ = ["AtWork", "Status", "in_words", "status", "stop", "unfinished"]

State = Literal["running", "waiting", "finished"]
"""Somebody is at it; nobody is, and trials are left; none is left."""
LEFT = (
    (None, "unheard", "its command may be gone; in half a minute another one may take it over"),
    (False, "left", "nobody is at it; kdexp sweep goes on with it"),
)
"""What is said of trials whose command is not known to live."""


@dataclass(frozen=True)
class AtWork:
    """A trial that has begun and not ended."""

    trial: int
    repeats: int | None
    """The trial whose recipe it trains again."""
    alive: bool | None
    """Whether the command that has it lives; None: nothing is heard of it now."""
    val_accuracy: float | None
    """Of its last epoch that is on record, 0 to 1."""


@dataclass(frozen=True)
class Status:
    """How a study stands."""

    study: str
    state: State
    budget: int
    """Trainings that it may take."""
    ended: dict[str, int]
    """How many of them ended how: complete, pruned, diverged, given up."""
    skipped: int
    """Proposals that were not worth training."""
    commands: int
    """That live and train a trial."""
    at_work: tuple[AtWork, ...]
    size: Size
    """What `smallest` is counted in."""
    smallest: int | None
    """The size of the smallest student that is sure so far (or over the bar, where trials are not
    repeated) ..."""
    smallest_trial: int | None
    """... and its trial."""
    sure: bool
    """Whether trials are repeated until they are sure."""
    best_val_accuracy: float | None
    """Of all that have ended, 0 to 1."""
    seconds_a_trial: float | None
    seconds_left: float | None
    """Until the last trial has ended, at the pace and with the commands of now."""
    run_id: str


def status(study: RunRecord, settings: Settings, tracking: Tracking) -> Status:
    """How a study stands now. Raises KdexpError."""
    sweep, folds = sweep_of(study, tracking), int(study.tags.get(FOLDS, 1))
    with study_there(sweep, study.run_id, settings, folds) as there:
        under_way = _under_way(there, settings)
        left, one, smallest = there.left, there.seconds_a_trial, _smallest(there)
        skipped, given_up = there.skipped, there.given_up
    runs = tracking.find("trial", {"mlflow.parentRunId": study.run_id}, study.experiment_id)
    whole = {run.tags["kdexp.trial"]: run for run in runs if run.status == "FINISHED"}
    accuracies = [run.metrics["val_accuracy"] for run in whole.values()]
    ended = Counter(run.tags.get("kdexp.state", "complete") for run in whole.values())
    if given_up:
        ended["given up"] = given_up
    busy = sum(each.state == "held" for each in under_way)
    return Status(
        study=study.tags["kdexp.study"],
        state="finished" if left <= 0 else "running" if busy else "waiting",
        budget=sweep.study.trials,
        ended=dict(ended),
        skipped=skipped,
        commands=len({each.command for each in under_way if each.state == "held"}),
        at_work=_at_work(under_way, runs),
        size=sweep.selection.size,
        smallest=smallest.size if smallest else None,
        smallest_trial=smallest.trial if smallest else None,
        sure=sweep.repeats,
        best_val_accuracy=max(accuracies, default=None),
        seconds_a_trial=one,
        seconds_left=one * left / busy if one is not None and busy else None,
        run_id=study.run_id,
    )


def stop(study: RunRecord, settings: Settings, tracking: Tracking) -> int:
    """Ask every command that is at a study to begin nothing more; how many trials they are at.
    Raises KdexpError.
    """
    with study_there(sweep_of(study, tracking), study.run_id, settings) as there:
        there.stop()
        return sum(each.state == "held" for each in _under_way(there, settings))


def unfinished(tracking: Tracking) -> list[RunRecord]:
    """The studies whose trials have not all ended, as far as their runs say, oldest first."""
    return [run for run in tracking.find("study", {}) if run.status != "FINISHED"]


def _under_way(study: OpenStudy, settings: Settings) -> list[UnderWay]:
    with closing(Claimant(settings)) as onlooker:
        return study.at_work(onlooker)


def _smallest(study: OpenStudy) -> Passing | None:
    return study.smallest if study.sweep.study.objective == "smallest" else None


def _at_work(under_way: Sequence[UnderWay], runs: Sequence[RunRecord]) -> tuple[AtWork, ...]:
    alive = {"held": True, "doubtful": None, "free": False}
    reached = {  # the newest run of a trial that was begun anew
        int(run.tags["kdexp.trial"]): run.metrics.get("epoch/val_accuracy") for run in runs
    }
    return tuple(
        AtWork(each.number, each.repeats, alive[each.state], reached.get(each.number))
        for each in under_way
    )


def in_words(found: Sequence[Status]) -> str:
    """As people read it, some lines for each study."""
    if not found:
        return "No study is under way; kdexp list shows those that there are."
    return "\n\n".join("\n".join(_lines(one)) for one in found)


def _lines(one: Status) -> Iterator[str]:
    what, done = "trainings" if one.sure else "trials", sum(one.ended.values())
    how = ", ".join(f"{count} {state}" for state, count in sorted(one.ended.items()))
    yield f"study     {one.study}: {done} of {one.budget} {what} ended{f' ({how})' if how else ''}"
    if one.skipped:
        yield f"          {one.skipped:,} more proposals were not worth training"
    alive = [each for each in one.at_work if each.alive]
    if alive:
        commands = "1 command" if one.commands == 1 else f"{one.commands} commands"
        yield f"at work   {commands}: {', '.join(map(_trial, alive))}"
    for is_alive, name, why in LEFT:
        others = [each for each in one.at_work if each.alive is is_alive]
        if others:
            yield f"{name:<9} {', '.join(map(_trial, others))}: {why}"
    if one.smallest is not None:
        kind, unit = "sure" if one.sure else "over the bar", one.size.replace("_", "-")
        yield f"smallest  {one.smallest:,} {unit}, {kind} so far: trial {one.smallest_trial}"
    elif one.best_val_accuracy is not None:
        none = "is sure yet" if one.sure else "is known to meet the bar"
        yield f"smallest  none {none}; the most accurate has {100 * one.best_val_accuracy:.2f} %"
    yield f"time      {_time(one)}"


def _trial(each: AtWork) -> str:
    again = "" if each.repeats is None else f" (repeats trial {each.repeats})"
    val = "" if each.val_accuracy is None else f" at {100 * each.val_accuracy:.2f} %"
    return f"trial {each.trial}{again}{val}"


def _time(one: Status) -> str:
    if one.state == "finished":
        return f"nothing is left to train: kdexp select {shlex.quote(one.study)}"
    if one.state == "waiting":
        return "nobody is at it: the same kdexp sweep goes on with it"
    if one.seconds_left is None or one.seconds_a_trial is None:
        return "not known yet"
    return f"about {duration(one.seconds_left)} left, {duration(one.seconds_a_trial)} each"
