"""A worker: from a job to what came of it. It computes; it knows no server, no study and no lock.

A *job* is one training, or several that train as one. `work` trains it, keeps its checkpoints, and
says after each epoch what was measured. It waits for nobody who records that. Where its scheduler
may end a training early, it waits a moment for the verdict and goes on without it; a verdict that
comes later counts then.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from kdexp import KdexpError
from kdexp.config import Data, Recipe
from kdexp.distill.batches import views
from kdexp.distill.checkpoints import CHECKPOINT_SECONDS, Checkpoint, Checkpoints, Kept, State
from kdexp.distill.datasets import Splits
from kdexp.distill.guard import stored_correct
from kdexp.distill.models import ModelError
from kdexp.distill.packs import Execution, Lane, Source
from kdexp.distill.teacher import CachedTeacher
from kdexp.distill.train import EPOCH_METRICS, EpochReport, Reports, Snapshot, train
from kdexp.own import own_line
from kdexp.settings import first_line, in_one_line, without_credentials
from kdexp.surroundings import out_of_memory

__all__ = [
    "FOLDS_KEPT",
    "Broke",
    "Done",
    "Ended",
    "Epoch",
    "Job",
    "Measured",
    "Message",
    "Prepared",
    "Row",
    "Task",
    "Verdict",
    "broke",
    "work",
]

FOLDS_KEPT = 4
"""So many folds stay cut: of Fashion-MNIST each is a copy of 47 MB, made in a tenth of a second."""
MOMENT = 0.25  # seconds that a training waits for a verdict at least, where its epochs are shorter
Row = Mapping[str, int | float]
"""What an epoch measured: `epoch`, `time_ms`, and each of EPOCH_METRICS."""


@dataclass(frozen=True)
class Prepared:
    """What every training of a study shares: data and teacher, and the run that records the
    teacher.
    """

    data: Data
    splits: Splits
    teacher: CachedTeacher
    teacher_run: str
    cut: dict[int, Splits] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The last folds that were asked for."""

    def __getstate__(self) -> dict[str, object]:
        """Pickled for another process, which cuts for itself."""
        return vars(self) | {"cut": {}}

    def on(self, fold: int | None = None, teacher: CachedTeacher | None = None) -> Prepared:
        """The same data and teacher for a training that holds out this fold; None: the own one.

        The logits are the same, seen by other columns; where they are not `of_all_images`, another
        fold comes with the `teacher` that has its own. What the teacher itself held out stays fold
        0. Raises DataError where there is no such fold.
        """
        if fold is None or fold == self.data.fold:
            return replace(self, teacher=teacher) if teacher else self
        splits = self._cut(fold)
        assert splits.kept is not None
        data = self.data.model_copy(update={"fold": fold})
        return Prepared(data, splits, teacher or self.teacher.on(splits.kept), self.teacher_run)

    def _cut(self, fold: int) -> Splits:
        found = self.cut.get(fold)
        if found is None:
            found = self.splits.cut_by(self.data.model_copy(update={"fold": fold}))
            for former in list(self.cut)[: 1 - FOLDS_KEPT]:
                self.cut.pop(former, None)
            self.cut[fold] = found
        return found

    @property
    def source(self) -> Source:
        """What batches of labelled images are gathered from."""
        split = self.splits.train
        return Source(split, views(self.data.augment).to(split.labels.device), None)


@dataclass(frozen=True)
class Task:
    """One training of a job."""

    run_id: str
    """Of the run that records it."""
    recipe: Recipe
    environment: Mapping[str, str]
    """What its last bits depend on: a checkpoint remembers it."""
    checkpoint: str = ""
    """The name of its checkpoint; without one it keeps none."""
    resumed: bool = False
    """Whether it goes on from its checkpoint."""
    keeps: bool = True
    """Whether it keeps a checkpoint of its own, if it has one at all."""
    last: int | None = None
    """The epoch after which it is to end, as one that is pruned; None: where its recipe says."""


@dataclass(frozen=True)
class Job:
    """What a worker is to train."""

    number: int
    tasks: Mapping[int, Task]
    """By slot: the places of trainings that train as one. All are of one fuse key."""
    execution: Execution
    threads: int
    checkpoints: Path | None = None
    watched: bool = False
    """Whether a verdict may come after each epoch."""
    fold: int | None = None
    """Which is held out; None: that of the data that the worker has."""
    teacher: CachedTeacher | None = None
    """Whose logits are for this fold and training alone; None: the one that the worker has."""


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training. So many of its epochs are `safe`: in a checkpoint, or in need of
    none.
    """

    run_id: str
    report: EpochReport
    row: Row
    safe: int


@dataclass(frozen=True)
class Measured:
    """An epoch of a job: of each of its trainings, by slot."""

    job: int
    epochs: Mapping[int, Epoch]


@dataclass(frozen=True)
class Ended:
    """A training is over. `correct` is what the module that is stored has right on validation."""

    job: int
    slot: int
    run_id: str
    state: State
    bad_step: int | None
    kept_epoch: int
    correct: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Broke:
    """A job broke off. Where the surroundings failed (a full disk, …) no training of it is at
    fault.
    """

    job: int
    surroundings: bool
    why: str
    """In one line."""
    own: str
    """The line of the user's own network that raised it."""
    memory: bool
    """Whether no memory was left."""
    trace: str
    error: Exception | None = field(default=None, compare=False)
    """Where the worker is of this process."""

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"error": None}


@dataclass(frozen=True)
class Done:
    """Nothing is left of a job."""

    job: int


@dataclass(frozen=True)
class Verdict:
    """What a scheduler says after an epoch of a watched job: which trainings end now, and which
    take a free slot.
    """

    job: int
    stop: frozenset[str] = frozenset()
    """Their runs."""
    put: Mapping[int, Task] = field(default_factory=dict)


Message = Measured | Ended | Broke | Done


def work(
    job: Job,
    prepared: Prepared,
    say: Callable[[Message], object],
    hear: Callable[[float], Verdict | None],
    pulse: Callable[[], object] = lambda: None,
) -> None:
    """Train a job to its end. `hear` waits so many seconds for a verdict; `pulse` may raise between
    two steps.
    """
    try:
        with _threads(job.threads):
            here = prepared.on(job.fold, job.teacher)
            _Work(job, here, say, hear, pulse).train()
    except Exception as error:
        say(broke(job.number, [task.recipe for task in job.tasks.values()], error))
    else:
        say(Done(job.number))


class _Training:
    """A training in its slot."""

    def __init__(self, task: Task, checkpoints: Checkpoints | None) -> None:
        self.task, self.lane = task, Lane.of(task.recipe)
        self.checkpoints = checkpoints if task.checkpoint and task.keeps else None
        self.state: State = "running"
        self.kept: Kept | None = None
        self.bad_step: int | None = None
        self.begun: Snapshot | None = None
        self.history: list[Row] = []
        self.safe, self.saved = 0, float("-inf")
        if task.resumed and checkpoints and (found := checkpoints.load(task.checkpoint)):
            self.state, self.kept, self.bad_step = found.state, found.kept, found.bad_step
            self.begun = found.snapshot
            self.history = list(found.history)
            self.safe = len(found.history)

    @property
    def over(self) -> bool:
        return self.state != "running"

    def take(self, report: EpochReport) -> None:
        """Take note of an epoch, and keep a checkpoint where one is due."""
        row: Row = {name: getattr(report, name) for name in EPOCH_METRICS}
        self.history.append({"epoch": report.epoch, "time_ms": time.time_ns() // 1_000_000, **row})
        if not report.finite:
            self.state, self.bad_step = "diverged", report.bad_step
        elif report.weights is not None:
            self.kept = Kept(report.epoch, report.val_correct, report.weights)
        if not self.over and report.epoch == report.epochs:
            self.state = "complete"
        if not self.over and report.epoch == self.task.last:
            self.state = "pruned"
        self.keep(report)

    def keep(self, report: EpochReport) -> None:
        """A checkpoint after an epoch: of the last one always, else not every second."""
        now = time.monotonic()
        if self.checkpoints is None:
            self.safe = len(self.history)
        elif self.over or now - self.saved >= CHECKPOINT_SECONDS:
            assert report.snapshot is not None
            task, snapshot = self.task, report.snapshot()
            found = (
                task.run_id,
                task.environment,
                self.state,
                self.bad_step,
                self.history,
                self.kept,
            )
            self.checkpoints.save(task.checkpoint, Checkpoint(*found, snapshot))
            self.saved, self.safe = now, len(self.history)


class _Work:
    """A job under way."""

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        say: Callable[[Message], object],
        hear: Callable[[float], Verdict | None],
        pulse: Callable[[], object],
    ) -> None:
        self.job, self.prepared, self.say, self.hear, self.pulse = job, prepared, say, hear, pulse
        self.checkpoints = Checkpoints(job.checkpoints) if job.checkpoints else None
        self.trainings = {
            slot: _Training(task, self.checkpoints) for slot, task in job.tasks.items()
        }
        self.owed = 0
        """Verdicts that have not come."""

    def train(self) -> None:
        """Every training to its end."""
        for slot, one in list(self.trainings.items()):
            if one.over:  # it was broken off between its last epoch and its end
                self._end(slot, {})
        if not self.trainings:
            return
        lanes, begun = self._lanes()
        shared, soft = self.prepared, self.prepared.teacher.soft
        how = self.job.execution
        training = train(
            lanes, shared.splits, shared.data, soft, how, resumed=begun, pulse=self.pulse
        )
        changes: dict[int, Lane | None] | None = None
        while self.trainings:
            reports, changes = training.send(changes), {}
            taken = {slot: self._take(slot, reports) for slot in self.trainings}
            late = self.owed > 0
            self.owed += 1
            self.say(Measured(self.job.number, taken))
            for slot in taken:
                if self.trainings[slot].over:
                    self._end(slot, changes)
            if self.job.watched:
                seconds = max(epoch.report.seconds for epoch in taken.values())
                self._heed(reports, changes, 0.0 if late else max(MOMENT, seconds / 2))
        training.close()

    def _take(self, slot: int, reports: Reports) -> Epoch:
        one, report = self.trainings[slot], reports[slot]
        assert report is not None
        one.take(report)
        return Epoch(one.task.run_id, report.numbers, one.history[-1], one.safe)

    def _heed(self, reports: Reports, changes: dict[int, Lane | None], patience: float) -> None:
        """Do what the verdicts say that come within so many seconds."""
        deadline = time.monotonic() + patience
        while self.owed and self.trainings:
            verdict = self.hear(max(deadline - time.monotonic(), 0.0))
            if verdict is None:
                return
            if verdict.job != self.job.number:
                continue
            self.owed -= 1
            for slot, one in list(self.trainings.items()):
                report = reports[slot]
                if one.task.run_id in verdict.stop and report is not None:
                    one.state = "pruned"
                    one.keep(report)
                    self._end(slot, changes)
            for slot, task in verdict.put.items():
                self.trainings[slot] = _Training(task, self.checkpoints)
                changes[slot] = self.trainings[slot].lane

    def _lanes(self) -> tuple[list[Lane | None], list[Snapshot | None]]:
        every = range(self.job.execution.lanes)
        lanes = [self.trainings[slot].lane if slot in self.trainings else None for slot in every]
        begun = [self.trainings[slot].begun if slot in self.trainings else None for slot in every]
        return lanes, begun

    def _end(self, slot: int, changes: dict[int, Lane | None]) -> None:
        one, validation = self.trainings.pop(slot), self.prepared.splits.validation
        changes[slot] = None
        kept = one.kept or Kept(0, 0, {})
        correct = kept.val_correct
        if kept.weights:
            student = one.task.recipe.student
            correct = stored_correct(student, kept.weights, correct, validation)
        self.owed += 1
        found = one.state, one.bad_step, kept.epoch, correct, kept.weights
        self.say(Ended(self.job.number, slot, one.task.run_id, *found))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """In here so many CPU threads: another number would sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def broke(job: int, recipes: Iterable[Recipe], error: Exception) -> Broke:
    """Why a job broke off: where a network of the user's own is at fault, with the line of it."""
    surroundings = isinstance(error, KdexpError | OSError) and not isinstance(error, ModelError)
    is_own = any(":" in recipe.student.architecture for recipe in recipes)
    own = own_line(error) if is_own else ""
    why = (
        f"{type(error).__name__}: {without_credentials(first_line(error))} ({own})"
        if own
        else in_one_line(error)
    )
    trace = without_credentials("".join(traceback.format_exception(error)))
    return Broke(job, surroundings, why, own, out_of_memory(error), trace, error)
