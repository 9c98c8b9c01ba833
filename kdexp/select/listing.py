"""What there is: the studies of a store, and the trials of one, as rows. Nothing is trained, looked
at or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kdexp.config import Size, Sweep
from kdexp.runs.outcome import Outcome
from kdexp.runs.records import REPEATS, values_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.select.promote import candidates_of, ended, sweep_of, under
from kdexp.selection import Candidate, passes, standing

__all__ = ["StudyRow", "TrialRow", "frontier", "studies_there", "trials_of"]


ENDINGS = ("FINISHED", "RUNNING", "SCHEDULED", "FAILED", "KILLED")
"""What a trial counts as, where it has runs of several."""


@dataclass(frozen=True)
class StudyRow:
    """A study, and what it came to so far. What is None is not known yet."""

    study: str
    trials: int
    """That have ended, repeats among them."""
    accuracy_bar: float | None
    selected_parameters: int | None
    selected_val_accuracy: float | None
    selected_test_accuracy: float | None
    selected_run: str | None
    confirmed: str | None
    """What fresh seeds said of the model."""
    run_id: str


@dataclass(frozen=True)
class TrialRow:
    """A trial of a study. Accuracies are 0 to 1; what is None was not measured."""

    trial: int
    repeats: int | None
    """The trial whose recipe it trains again."""
    fold: int
    """That it held out."""
    state: str
    """complete, pruned or diverged; running or failed where its run has not ended."""
    parameters: int | None
    multiply_adds: int | None
    bytes: int | None
    activation_bytes: int | None
    val_accuracy: float | None
    val_low: float | None
    """Lower end of the 95 % interval (Wilson) ..."""
    val_high: float | None
    """... and the upper one."""
    test_accuracy: float | None
    """Of the few models that were looked at."""
    standing: str
    """By the study's rule, in a few words: yes, no, not repeated, or what its repeats say."""
    passes: bool
    run_id: str
    searched: Mapping[str, Any] = field(default_factory=dict)
    """The values of what the study searches, by key."""


def studies_there(tracking: Tracking) -> list[StudyRow]:
    """Every study of the store, oldest first."""
    return [_study(run, tracking) for run in tracking.find("study", {})]


def trials_of(study: RunRecord, tracking: Tracking) -> list[TrialRow]:
    """A study's trials by number, each by the study's own rule. Raises KdexpError."""
    sweep = sweep_of(study, tracking)
    runs = tracking.find("trial", {"mlflow.parentRunId": study.run_id}, study.experiment_id)
    known = under(sweep.selection, candidates_of(ended(runs)), study, tracking)
    judged = {candidate.run_id: candidate for candidate in known}
    rows = dict[int, TrialRow]()
    for run in sorted(runs, key=lambda run: ENDINGS.index(run.status)):
        row = _trial(run, judged.get(run.run_id), sweep)
        rows.setdefault(row.trial, row)  # one that was begun anew has more runs than one
    return [rows[number] for number in sorted(rows)]


def frontier(rows: Sequence[TrialRow], size: Size = "parameters") -> list[TrialRow]:
    """The recipes than which none is both as small and more accurate, or smaller and as accurate,
    smallest first.

    By the one training on the study's own validation images: repeats are no recipes of their own.
    """
    first = [
        row
        for row in rows
        if row.repeats is None
        and row.state == "complete"
        and row.val_accuracy is not None
        and getattr(row, size) is not None
    ]
    found, best = list[TrialRow](), -math.inf
    for row in sorted(first, key=lambda row: (getattr(row, size), -_accuracy(row), row.trial)):
        if _accuracy(row) > best:
            found.append(row)
            best = _accuracy(row)
    return found


def _accuracy(row: TrialRow) -> float:
    return -math.inf if row.val_accuracy is None else row.val_accuracy


def _study(run: RunRecord, tracking: Tracking) -> StudyRow:
    trials = tracking.find("trial", {"mlflow.parentRunId": run.run_id}, run.experiment_id)
    finished = [trial for trial in trials if trial.status == "FINISHED"]
    metrics, parameters = run.metrics, run.metrics.get("selected_parameters")
    return StudyRow(
        study=run.tags["kdexp.study"],
        trials=len(finished),
        accuracy_bar=_bar(run, tracking),
        selected_parameters=None if parameters is None else int(parameters),
        selected_val_accuracy=metrics.get("selected_val_accuracy"),
        selected_test_accuracy=metrics.get("selected_test_accuracy"),
        selected_run=run.tags.get("kdexp.selected_run"),
        confirmed=run.tags.get("kdexp.confirmed"),
        run_id=run.run_id,
    )


def _bar(run: RunRecord, tracking: Tracking) -> float | None:
    with suppress(KeyError):
        return run.metrics["bar"]  # the one that its model was selected by
    return sweep_of(run, tracking).selection.accuracy_bar


def _trial(run: RunRecord, known: Candidate | None, sweep: Sweep) -> TrialRow:
    end = Outcome.recorded(run) if "val_accuracy" in run.metrics and _ended(run) else None
    low, high = end.val_interval if end and end.val_samples else (None, None)
    size, repeats = end.size if end else None, run.tags.get(REPEATS)
    return TrialRow(
        trial=int(run.tags["kdexp.trial"]),
        repeats=None if repeats is None else int(repeats),
        fold=int(run.params.get("data.fold", 0)),
        state=end.state if end else run.tags.get("kdexp.state", run.status.lower()),
        parameters=size.parameters if size else None,
        multiply_adds=size.multiply_adds if size else None,
        bytes=size.bytes if size else None,
        activation_bytes=size.activation_bytes if size else None,
        val_accuracy=end.val_accuracy if end else None,
        val_low=low,
        val_high=high,
        test_accuracy=run.metrics.get("test_accuracy"),
        standing="" if known is None else standing(known, sweep.selection),
        passes=known is not None and passes(known, sweep.selection),
        run_id=run.run_id,
        searched=values_of(run, sweep.search),
    )


def _ended(run: RunRecord) -> bool:
    return run.status == "FINISHED" and "kdexp.state" in run.tags
