"""One process's part of a study: trials one after another, or fused, from Optuna's choice to a finished run, as events.

Whatever stops it (Ctrl-C, kill -9, a full disk) leaves finished trials finished, and the trial that was under
way to the next process that looks for one. Events are small and can be pickled: they travel between processes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

import torch

from kdexp import KdexpError
from kdexp.config import Recipe
from kdexp.distill.execution import choose
from kdexp.distill.models import build, measure
from kdexp.distill.packs import Execution, Lane
from kdexp.distill.train import EpochReport, train
from kdexp.runner import Prepared, Result, started
from kdexp.selection import size_of
from kdexp.stopping import beaten, hopeless
from kdexp.study import Ended, OpenStudy, Trial
from kdexp.tracking import Tracking
from kdexp.workers import Worker

__all__ = ["EpochDone", "TrialEvent", "TrialFinished", "TrialSkipped", "TrialStarted", "leave", "run_trials"]


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins (again, where `retried`)."""

    number: int
    recipe: Recipe
    retried: bool


@dataclass(frozen=True)
class EpochDone:
    """An epoch of a trial; the report's weights are left out."""

    number: int
    report: EpochReport


@dataclass(frozen=True)
class TrialFinished:
    """A trial has ended; `done` of the study's trials are finished now."""

    number: int
    result: Result
    done: int


@dataclass(frozen=True)
class TrialSkipped:
    """A trial was not trained, and why; `done` of the study's trials are finished now."""

    number: int
    recipe: Recipe
    why: str
    done: int


TrialEvent = TrialStarted | EpochDone | TrialFinished | TrialSkipped


def run_trials(
    study: OpenStudy, prepared: Prepared, tracking: Tracking, experiment_id: str, worker: Worker, pack: int = 1
) -> Generator[TrialEvent, None, None]:
    """Train trials until there is none left to begin or to take over. Close the generator to stop cleanly.

    With `pack` above 1, so many trials are asked for at once, and those that can be fused train as one batch.
    """
    here = _Here(study, prepared, tracking, experiment_id, worker, pack)
    while trials := here.next_group():
        yield from _run_pack(trials, here)
    yield from here.news()


def leave(study: OpenStudy, tracking: Tracking, worker: Worker, finished: bool) -> int:
    """How many trials others have under way; with none, the study's run is closed.

    Called once this worker's own lock is free, so that of several that stop together the last one sees nobody.
    """
    others = study.others(worker)
    if not others:
        tracking.finish(study.parent_run, "FINISHED" if finished else "KILLED")
    return others


@dataclass(frozen=True)
class _Here:
    """This process's part of a study, and the trials it has asked for and not begun."""

    study: OpenStudy
    prepared: Prepared
    tracking: Tracking
    experiment_id: str
    worker: Worker
    pack: int
    waiting: list[Trial] = field(default_factory=list)
    skipped: list[TrialSkipped] = field(default_factory=list)

    def next_group(self) -> list[Trial]:
        """The next trials that can train as one: asked for together, of one fuse key."""
        while len(self.waiting) < self.pack and (trial := self._ask()):
            self.waiting.append(trial)
        return self._take(_key(self.waiting[0]), self.pack) if self.waiting else []

    def next_like(self, key: str) -> Trial | None:
        """One more trial of a fuse key; one of another key waits for the next pack."""
        if not any(_key(trial) == key for trial in self.waiting) and (trial := self._ask()):
            self.waiting.append(trial)
        return next(iter(self._take(key, 1)), None)

    def _take(self, key: str, count: int) -> list[Trial]:
        taken = [trial for trial in self.waiting if _key(trial) == key][:count]
        self.waiting[:] = [trial for trial in self.waiting if trial not in taken]
        return taken

    def news(self) -> list[TrialSkipped]:
        """What was skipped since this was last asked."""
        news = list(self.skipped)
        self.skipped.clear()
        return news

    def _ask(self) -> Trial | None:
        """The next trial that is worth its training."""
        while trial := self.study.next_trial(self.worker, lambda number: _ended(number, self.study, self.tracking)):
            why = self._beaten(trial)
            if why is None:
                return trial
            self.study.skip(trial, why)
            self.skipped.append(TrialSkipped(trial.number, trial.recipe, why, self.study.done))
        return None

    def _beaten(self, trial: Trial) -> str | None:
        if not self.study.sweep.study.early_stop or trial.control:
            return None
        rule, like = self.study.sweep.selection, self.prepared.splits.train
        with torch.random.fork_rng([]):
            size = size_of(measure(build(trial.recipe.student, like), like), rule.size)
        winner = beaten(size, rule, self.study.outcomes)
        if winner is None:
            return None
        return f"{size:,} {rule.size.replace('_', '-')}; trial {winner.trial} meets the bar with {winner.size:,}"


class _Seat:
    """A trial under way in one place of a pack: its run is open until it leaves, or until all are closed."""

    def __init__(self, trial: Trial, here: _Here, how: Execution, place: int, everyone: ExitStack) -> None:
        self.trial, self.here = trial, here
        everyone.push(self._tidy)
        self.stack = everyone.enter_context(ExitStack())
        self.running = self.stack.enter_context(
            started(
                trial.recipe,
                here.prepared,
                here.tracking,
                here.experiment_id,
                "trial",
                " · ".join(filter(None, [f"trial {trial.number}", trial.control])),
                parent=here.study.parent_run,
                tags={"kdexp.study": here.study.sweep.name, "kdexp.trial": str(trial.number)},
                params={"trial": trial.number},
                how=how,
                place=place,
            )
        )
        trial.link(self.running.run_id)

    def _tidy(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stopped: also a run that MLflow had made, but not yet handed to us, is closed."""
        if kind is not None:
            with suppress(KdexpError):
                _ended(self.trial.number, self.here.study, self.here.tracking)

    def take(self, report: EpochReport) -> bool:
        """Record an epoch; whether it was the trial's last."""
        self.running.record(report)
        if self.running.state == "complete" and (self.trial.report(report) or self._pointless(report)):
            self.running.state = "pruned"
        return self.running.state != "complete" or report.epoch == report.epochs

    def leave(self) -> TrialFinished:
        """Close the run, then tell Optuna."""
        self.stack.close()
        result = self.running.result
        assert result is not None
        if self.here.study.sweep.study.early_stop and result.state == "complete":
            self.trial.remember(size_of(result.size, self.here.study.sweep.selection.size), self._curve())
        self.here.study.tell(self.trial.number, result.state, result.val_accuracy)
        return TrialFinished(self.trial.number, result, self.here.study.done)

    def _pointless(self, report: EpochReport) -> bool:
        study, samples = self.here.study, len(self.here.prepared.splits.validation)
        if not study.sweep.study.early_stop or self.trial.control or report.epoch == report.epochs:
            return False
        rule, outcomes = study.sweep.selection, study.outcomes
        smaller = beaten(size_of(self.running.size, rule.size), rule, outcomes)
        return smaller is not None or hopeless(self._curve(), rule, outcomes, report.epochs, samples)

    def _curve(self) -> list[float]:
        return [row["val_accuracy"] for row in self.running.history]


def _run_pack(trials: list[Trial], here: _Here) -> Generator[TrialEvent, None, None]:
    """Train these trials together. Where trials are pruned, others of their kind take over the free places."""
    prepared, refill = here.prepared, len(trials) > 1 and here.study.prunes
    lanes = [Lane.of(trial.recipe) for trial in trials]
    how = choose(lanes, prepared.splits.train, refill)
    yield from here.news()
    with ExitStack() as everyone:
        seats: dict[int, _Seat] = {}
        for place, trial in enumerate(trials):
            yield TrialStarted(trial.number, trial.recipe, trial.retried)
            seats[place] = _Seat(trial, here, how, place, everyone)
        training = train(lanes, prepared.splits, prepared.data, prepared.teacher.soft, how)
        changes: dict[int, Lane | None] | None = None
        while seats:
            reports, changes = training.send(changes), {}
            for place, seat in list(seats.items()):
                report = reports[place]
                assert report is not None
                last = seat.take(report)
                yield EpochDone(seat.trial.number, replace(report, weights=None))
                if last:
                    yield seats.pop(place).leave()
                    changes[place] = None
                    if refill and (successor := here.next_like(lanes[0].fuse_key)):
                        yield TrialStarted(successor.number, successor.recipe, successor.retried)
                        seats[place] = _Seat(successor, here, how, place, everyone)
                        changes[place] = Lane.of(successor.recipe)
        training.close()


def _key(trial: Trial) -> str:
    return Lane.of(trial.recipe).fuse_key


def _ended(number: int, study: OpenStudy, tracking: Tracking) -> Ended | None:
    """How a trial ended whose worker is gone; where it did not, whatever runs it left open are closed."""
    for run in tracking.find("trial", {"mlflow.parentRunId": study.parent_run, "kdexp.trial": str(number)}):
        if run.status == "FINISHED":
            return run.tags["kdexp.state"], run.metrics["val_accuracy"]  # type: ignore[return-value]
        if run.status == "RUNNING":
            tracking.tag(run.run_id, {"kdexp.state": "interrupted"})
            tracking.finish(run.run_id, "KILLED")
    return None
