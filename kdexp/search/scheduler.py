"""A study's trials, from Optuna's choice to a finished run, by a pool of workers: the one who
decides and records.

It asks Optuna for a trial, opens its run, and hands it to a free worker as a job. What the worker
says is recorded, told to Optuna, and yielded as events. Whatever stops it (Ctrl-C, kill -9, a full
disk) leaves finished trials finished, and those under way to the next command that looks for one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

from kdexp import KdexpError
from kdexp.config import Recipe
from kdexp.deadline import Deadline
from kdexp.distill.checkpoints import CHECKPOINT_SECONDS, Checkpoint
from kdexp.distill.execution import choose
from kdexp.distill.models import ModelError, Size, measure, outline
from kdexp.distill.packs import Lane
from kdexp.distill.train import EpochReport, whole_epochs
from kdexp.repeats import Verdict as Sureness
from kdexp.runs.bench import Bench
from kdexp.runs.describe import InStudy
from kdexp.runs.outcome import Outcome
from kdexp.runs.prepare import TeacherProgress, prepare
from kdexp.runs.recording import Entry, Form, Recording, begin, close_run, goes_on_here
from kdexp.runs.records import REPEAT, REPEATS
from kdexp.runs.tracking import Tracking
from kdexp.search.claims import Claimant, ClaimLost, HandedBack
from kdexp.search.study import OpenStudy, Trial
from kdexp.selection import of_one, size_of
from kdexp.workers.pool import Died, Pool, Worker
from kdexp.workers.work import (
    Broke,
    Done,
    Ended,
    Job,
    Measured,
    Message,
    Prepared,
    Task,
    Verdict,
    broke,
)

__all__ = [
    "EpochDone",
    "NoMore",
    "Scheduler",
    "TrialEvent",
    "TrialFailed",
    "TrialFinished",
    "TrialGivenUp",
    "TrialSkipped",
    "TrialStarted",
    "TrialTaken",
    "WorkerLost",
    "WorkersGone",
    "finished",
    "leave",
]

log = logging.getLogger("kdexp")
T = TypeVar("T")


class TrialsFail(KdexpError):
    """A failure that all trials of a study share."""


class WorkersGone(KdexpError):
    """Every worker is gone, and trials are left."""


class NoMore(KdexpError):
    """Trials are left that this command was not to begin: it was asked to stop, or (`late`) its
    time is nearly up.
    """

    def __init__(self, said: str, late: bool) -> None:
        super().__init__(said)
        self.late = late


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins; where `retried`, it goes on after this epoch, or begins again at 0."""

    number: int
    recipe: Recipe
    retried: bool
    epoch: int = 0
    repeats: int | None = None
    """The trial whose recipe it trains again."""


@dataclass(frozen=True)
class EpochDone:
    """An epoch of a trial."""

    number: int
    report: EpochReport


@dataclass(frozen=True)
class TrialFinished:
    """A trial has ended; `done` of the study's trials are finished now."""

    number: int
    outcome: Outcome
    done: int
    repeats: int | None = None
    """The trial whose recipe it trained again ..."""
    sureness: Sureness | None = None
    """... and what the repeats of that say by now."""


@dataclass(frozen=True)
class TrialSkipped:
    """A proposal is not worth training, and why: it is none of the study's trials."""

    number: int
    recipe: Recipe
    why: str


@dataclass(frozen=True)
class TrialGivenUp:
    """A trial is not tried again, and why; `done` of the study's trials are finished now."""

    number: int
    recipe: Recipe
    why: str
    done: int


@dataclass(frozen=True)
class TrialFailed:
    """A trial broke off by itself, and why; it is tried again."""

    number: int
    why: str


@dataclass(frozen=True)
class TrialTaken:
    """Another command has taken a trial over while this one was cut off: what was trained here is
    dropped.
    """

    number: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker ended before its time, and of what; `trials` are those it was training."""

    worker: int
    trials: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        where = f" in trial {', '.join(map(str, self.trials))}" if self.trials else ""
        return f"worker {self.worker} ended{where}: {self.why}"


TrialEvent = (
    TrialStarted
    | EpochDone
    | TrialFinished
    | TrialFailed
    | TrialGivenUp
    | TrialSkipped
    | TrialTaken
    | WorkerLost
    | TeacherProgress
)


@dataclass(frozen=True)
class _Claimed:
    """A trial to train, and from where: its checkpoint, if it has one that goes on here."""

    trial: Trial
    checkpoint: Checkpoint | None

    @cached_property
    def lane(self) -> Lane:
        """How it is trained."""
        return Lane.of(self.trial.recipe)

    @cached_property
    def form(self) -> Form | None:
        """The form that it must keep; None: any."""
        return Form.of(self.checkpoint.environment) if self.checkpoint else None

    @property
    def slot(self) -> int | None:
        """The slot that it must have; None: any."""
        return self.form.slot if self.form else None

    @cached_property
    def key(self) -> tuple[str, ...]:
        """Trials can train as one if their keys are equal: for resumed ones also the recorded
        execution, threads and epoch.
        """
        alike = _alike(self.trial.recipe)
        if self.checkpoint is None or self.form is None:
            return alike
        how = self.form.execution
        # which may cut their last epoch short
        together = how.shared or self.lane.training.max_steps
        epoch = self.checkpoint.snapshot.epoch if together else ""
        return (*alike, repr(how), str(self.form.threads), str(epoch))


@dataclass(frozen=True)
class _Running:
    """A trial under way, and its run."""

    trial: Trial
    recording: Recording
    task: Task


@dataclass
class _Assigned:
    """A job that a worker has, and its trials by slot."""

    worker: Worker
    job: Job
    trials: dict[int, _Running]
    refill: bool
    """Whether trials of its kind take over the slots that become free."""

    @property
    def key(self) -> tuple[str, ...]:
        """What a trial that begins must have to join."""
        return _alike(next(iter(self.job.tasks.values())).recipe)


class Scheduler:
    """One command's part of a study."""

    def __init__(
        self,
        study: OpenStudy,
        prepared: Prepared,
        bench: Bench,
        claimant: Claimant,
        pool: Pool,
        pack: int = 1,
        deadline: Deadline | None = None,
    ) -> None:
        """With `pack` above 1, so many trials are asked for at once, and those that can be fused
        train as one. Before the `deadline` nothing is begun that would not reach a checkpoint.
        """
        self.study = study
        self.prepared = prepared
        self.bench = bench
        self.claimant = claimant
        self.pool = pool
        self.pack, self.checkpoints = pack, study.checkpoints(bench.settings)
        self.deadline, self.longest = deadline or Deadline(None), 0.0
        """When this command ends; the longest epoch so far, in seconds."""
        self.late = self.stopped = False
        """That nothing more is begun: the time is nearly up; somebody has asked for it."""
        self.folds: dict[tuple[int, int | None], Prepared] = {}
        """Data and teacher of other folds, where one teacher does not serve all; by the seed, too,
        where its cache holds the draws of one.
        """
        self.numbers = itertools.count(1)
        self.assigned: dict[int, _Assigned] = {}
        """By the number of their job."""
        self.waiting: list[_Claimed] = []
        """Asked for, and not begun."""
        self.news: list[TrialSkipped | TrialGivenUp] = []
        """What was not begun since this was last said."""
        self.lost: list[tuple[WorkerLost, str]] = []
        """Workers that are gone, each with its traceback."""
        self.failures: list[str] = []
        """Of trials that broke off by themselves, in words."""

    def run(self) -> Generator[TrialEvent, None, None]:
        """Train trials until none is left to begin or to take over. Close the generator to stop
        cleanly.

        Raises WorkersGone where workers died and trials are left.
        """
        error: BaseException | None = None
        try:
            with self.pool:
                yield from self._assign()
                while self.assigned:
                    worker, message = self.pool.receive()
                    yield from self._hear(worker, message)
                    if not isinstance(message, Measured | Ended):  # these leave no worker free
                        yield from self._assign()
            self._check_left()
        except BaseException as found:
            error = found
            raise
        finally:
            self._hand_all_back(error)

    # --- giving work ---

    def _assign(self) -> Generator[TrialEvent, None, None]:
        """A job for every free worker, while there are trials."""
        for worker in self.pool.living:
            if worker.job is None:
                group = self._next_group()
                yield from self._said()
                if not group:
                    return
                yield from self._start(worker, group)

    def _said(self) -> Generator[TrialEvent, None, None]:
        yield from self.news
        self.news.clear()

    def _next_group(self) -> list[_Claimed]:
        """The next trials that can train as one: asked for together, of one key."""
        if self._stops_here():
            return []
        while len(self.waiting) < self.pack and (claimed := self._ask()):
            self.waiting.append(claimed)
        return self._take(self.waiting[0].key, self.pack) if self.waiting else []

    def _next_like(self, key: tuple[str, ...]) -> _Claimed | None:
        """One more trial of a key; one of another key waits for the next job."""
        if self._stops_here():
            return None
        if not any(claimed.key == key for claimed in self.waiting) and (claimed := self._ask()):
            self.waiting.append(claimed)
        return next(iter(self._take(key, 1)), None)

    def _stops_here(self) -> bool:
        """Whether this command begins nothing more."""
        self.late = self.deadline.left < self.longest + CHECKPOINT_SECONDS
        self.stopped = self.stopped or self.study.stopped
        return self.late or self.stopped

    def _take(self, key: tuple[str, ...], count: int) -> list[_Claimed]:
        taken: list[_Claimed] = []
        for claimed in self.waiting:
            free = claimed.slot is None or claimed.slot not in [other.slot for other in taken]
            if claimed.key == key and free and (len(taken) < count or claimed.slot is not None):
                taken.append(claimed)
        return taken

    def _start(
        self, worker: Worker, group: Sequence[_Claimed]
    ) -> Generator[TrialEvent, None, None]:
        """Open the runs of trials, and hand them to a worker as one job."""
        number, recipes = next(self.numbers), [claimed.trial.recipe for claimed in group]
        try:
            yield from self._open(worker, group, number)
        except Exception as error:
            failure = broke(number, recipes, error)
            if failure.surroundings:
                raise
            if assigned := self.assigned.get(number):
                self._release(assigned, failure.why, "failed")
            yield from self._not_opened(group, failure)

    def _not_opened(
        self, group: Sequence[_Claimed], failure: Broke
    ) -> Generator[TrialEvent, None, None]:
        for claimed in [claimed for claimed in group if claimed in self.waiting]:
            self.waiting.remove(claimed)
            self.study.hand_back(claimed.trial, "failed")
        yield from self._failed([claimed.trial for claimed in group], failure)

    def _open(
        self, worker: Worker, group: Sequence[_Claimed], number: int
    ) -> Generator[TrialEvent, None, None]:
        first = group[0]
        prepared = yield from self._made_ready(first.trial.recipe)
        split, views = prepared.splits.train, prepared.teacher.soft.per == "view"
        free = self.study.prunes and whole_epochs(first.lane.training, len(split)) and views
        if first.form:
            how, threads = first.form.execution, first.form.threads
            refill = not how.shared and free
        else:
            refill = len(group) > 1 and free
            how = choose([claimed.lane for claimed in group], split, refill)
            threads = self.pool.size.threads
        trials, tasks = dict[int, _Running](), dict[int, Task]()
        job = Job(
            number,
            tasks,
            how,
            threads,
            self.checkpoints.folder,
            watched=self.study.prunes,
            fold=first.trial.recipe.data.fold,
            teacher=None if prepared.teacher.of_all_images else prepared.teacher,
        )
        self.assigned[number] = _Assigned(worker, job, trials, refill)
        for at, claimed in enumerate(group):
            slot = at if claimed.slot is None else claimed.slot
            yield _started(claimed)
            self._begin(claimed, Form(how, slot, threads), trials)
            tasks[slot] = trials[slot].task
        worker.give(job)

    def _on_its_fold(self, recipe: Recipe) -> Prepared:
        """Data and teacher as a training sees them: without the images that it holds out."""
        return finished(self._made_ready(recipe))

    def _made_ready(self, recipe: Recipe) -> Generator[TeacherProgress, None, Prepared]:
        """The same; yields progress where this fold's teacher has to be made first."""
        base, fold = self.prepared, recipe.data.fold
        seed = recipe.training.seed if base.teacher.soft.per == "epoch" else None
        if fold == base.data.fold and seed in (None, self.study.sweep.training.seed):
            return base
        if base.teacher.of_all_images:
            return base.on(fold)
        key = fold, seed
        if key not in self.folds:
            training = None if seed is None else recipe.training
            self.folds[key] = yield from prepare(recipe, self.bench, training=training)
        return self.folds[key]

    def _begin(self, claimed: _Claimed, form: Form, trials: dict[int, _Running]) -> None:
        """Open the run of a trial that takes a slot among these."""
        trial, checkpoint = claimed.trial, claimed.checkpoint
        again = "" if trial.repeats is None else f"repeats trial {trial.repeats}"
        name = " · ".join(filter(None, [f"trial {trial.number}", trial.control, again]))
        tags = {**_tags(trial.number, self.study), "kdexp.study": self.study.sweep.name}
        if trial.repeats is not None:
            tags |= {REPEATS: str(trial.repeats), REPEAT: str(trial.repeat)}
        entry = Entry(
            "trial",
            name,
            self.study.parent_run,
            tags,
            {"trial": trial.number},
            self._in_study(trial.repeats),
        )
        prepared = self._on_its_fold(trial.recipe)
        recording = begin(trial.recipe, prepared, self.bench, entry, form, checkpoint)
        resumed = checkpoint is not None
        told = recording.run_id, trial.recipe, recording.environment, _name(trial), resumed
        trials[form.slot] = _Running(trial, recording, Task(*told))
        self.waiting.remove(claimed)
        trial.link(recording.run_id)

    def _in_study(self, repeats: int | None) -> InStudy:
        sweep = self.study.sweep
        own = self.bench.experiment_id, self.study.parent_run
        return InStudy(*own, of_one(sweep), sweep.recipe, repeats)

    def _ask(self) -> _Claimed | None:
        """The next trial that is worth its training."""
        while trial := self.study.next_trial(self.claimant, self._outcome):
            try:
                if claimed := self._worth_training(trial):
                    return claimed
            except ClaimLost:  # before it was begun: another command decides about it
                self.study.hand_back(trial, "released")
            except BaseException:
                self.study.hand_back(trial, "released")
                raise
        return None

    def _outcome(self, number: int) -> Outcome | None:
        return _outcome(number, self.study, self.bench)

    def _worth_training(self, trial: Trial) -> _Claimed | None:
        checkpoint = self._checkpoint(trial)
        if why := self._given_up(trial, checkpoint):
            self.news.append(TrialGivenUp(trial.number, trial.recipe, why, self.study.done))
        elif why := self._futile(trial):
            self.study.skip(trial, why)
            self.news.append(TrialSkipped(trial.number, trial.recipe, why))
        else:
            return _Claimed(trial, checkpoint)
        return None

    def _checkpoint(self, trial: Trial) -> Checkpoint | None:
        found = self.checkpoints.load(_name(trial)) if trial.retried else None
        if (
            found
            and goes_on_here(found, trial.recipe, self._on_its_fold(trial.recipe))
            and self.bench.tracking.there(found.run_id)
        ):
            return found
        return None

    def _given_up(self, trial: Trial, checkpoint: Checkpoint | None) -> str:
        if not trial.broken:
            return ""
        tries = trial.tries(checkpoint.snapshot.epoch if checkpoint else 0)
        retries, tracking = self.study.sweep.study.retries, self.bench.tracking
        if tries <= retries:
            return ""
        runs = tracking.find("trial", _tags(trial.number, self.study), self.bench.experiment_id)
        reasons = [run.tags["kdexp.error"] for run in reversed(runs) if run.tags.get("kdexp.error")]
        last = next(iter(reasons), "its worker was killed")
        why = f"broke {tries} times without getting on (study.retries: {retries}): {last}"
        for run in runs:
            close_run(run.run_id, why, tracking)
        self.study.give_up(trial, why)
        self.checkpoints.remove(_name(trial))
        return why

    def _futile(self, trial: Trial) -> str:
        """Why a proposal is not worth training, or nothing."""
        if trial.control or trial.begun or trial.repeats is not None:
            return ""
        like = self.prepared.splits.train
        try:
            size = measure(outline(trial.recipe.student, like), like)
        except ModelError as error:  # each choice can be built, not every combination of them
            return str(error)
        if why := self.study.dominated(size):
            return why
        same = self.study.repeated(trial)
        return self._repeats(trial, size) if same is None else f"trial {same} trains the same"

    def _repeats(self, trial: Trial, size: Size) -> str:
        """That an earlier trial trains nearly the same, or nothing. In a search for the smallest a
        smaller student is new.
        """
        rule, like = self.study.sweep.selection, self.prepared.splits.train
        for number, recipe in self.study.like(trial).items():
            other = measure(outline(recipe.student, like), like)
            smallest = self.study.sweep.study.objective == "smallest"
            if not smallest or size_of(size, rule.size) >= size_of(other, rule.size):
                return f"trial {number} trains nearly the same"
        return ""

    # --- what workers say ---

    def _hear(self, worker: Worker, message: Message | Died) -> Generator[TrialEvent, None, None]:
        if isinstance(message, Died):
            if worker.retired:
                return
            yield from self._died(worker, message.why, message.trace)
            return
        assigned = self.assigned.get(message.job)
        if assigned is None:  # of a worker that was given up
            return
        match message:
            case Measured():
                yield from self._measured(assigned, message)
            case Ended():
                yield from self._ended(assigned, message)
            case Broke():
                yield from self._broke(assigned, message)
            case Done():
                self._done(assigned)

    def _measured(
        self, assigned: _Assigned, message: Measured
    ) -> Generator[TrialEvent, None, None]:
        known = [
            (assigned.trials[slot], epoch)
            for slot, epoch in message.epochs.items()
            if slot in assigned.trials
        ]
        for running, epoch in known:
            running.recording.take(epoch)
            self.longest = max(self.longest, epoch.report.seconds)
        if assigned.job.watched:
            stop = frozenset(
                epoch.run_id for running, epoch in known if self._stops(running, epoch.report)
            )
            assigned.worker.answer(Verdict(message.job, stop))
        for running, epoch in known:
            yield EpochDone(running.trial.number, epoch.report)

    def _stops(self, running: _Running, report: EpochReport) -> bool:
        """Whether a trial is to end now."""
        if not report.finite:
            return False
        return running.trial.report(report) or self._is_futile(running, report)

    def _is_futile(self, running: _Running, report: EpochReport) -> bool:
        study, samples = self.study, len(self.prepared.splits.validation)
        if (
            not study.sweep.study.early_stop
            or running.trial.trains_a_control
            or report.epoch == report.epochs
        ):
            return False
        size, curve, again = running.recording.size, running.recording.curve, running.trial.repeats
        return study.futile(size, curve, report.epochs, samples, again is not None)

    def _ended(self, assigned: _Assigned, message: Ended) -> Generator[TrialEvent, None, None]:
        """Close the run, then tell Optuna; the slot may go to a successor."""
        running = assigned.trials.pop(message.slot)
        try:
            outcome = self._conclude(running, message)
        except ClaimLost:
            running.recording.drop()
            # which it no longer is: it is forgotten here
            self.study.hand_back(running.trial, "released")
            yield TrialTaken(running.trial.number)
        except BaseException as error:
            running.recording.close(error)
            self.study.hand_back(running.trial, "released")
            raise
        else:
            number, repeats = running.trial.number, running.trial.repeats
            sureness = None if repeats is None else self.study.sureness(number)
            yield TrialFinished(number, outcome, self.study.done, repeats, sureness)
        if assigned.refill and assigned.trials and (successor := self._next_like(assigned.key)):
            yield from self._refill(assigned, message.slot, successor)
        yield from self._said()
        if assigned.job.watched:
            begun = assigned.trials.get(message.slot)
            put = {message.slot: begun.task} if begun else {}
            assigned.worker.answer(Verdict(message.job, put=put))

    def _done(self, assigned: _Assigned) -> None:
        """A worker has trained all that it knows of: trials that reached it too late are its next
        job.
        """
        late = {slot: running.task for slot, running in assigned.trials.items()}
        if not late:
            self._release(assigned)
            return
        self.assigned.pop(assigned.job.number)
        assigned.job = replace(assigned.job, number=next(self.numbers), tasks=late)
        self.assigned[assigned.job.number] = assigned
        assigned.worker.give(assigned.job)

    def _refill(
        self, assigned: _Assigned, slot: int, successor: _Claimed
    ) -> Generator[TrialEvent, None, None]:
        """Put a trial into a slot that has become free; one that cannot be opened costs itself
        alone.
        """
        job = assigned.job
        try:
            yield _started(successor)
            self._begin(successor, Form(job.execution, slot, job.threads), assigned.trials)
        except Exception as error:
            failure = broke(job.number, [successor.trial.recipe], error)
            if failure.surroundings:
                raise
            if running := assigned.trials.pop(slot, None):
                running.recording.close(failure.why)
                self.study.hand_back(running.trial, "failed")
            yield from self._not_opened([successor], failure)

    def _conclude(self, running: _Running, message: Ended) -> Outcome:
        """Finish the run, then tell Optuna. Raises ClaimLost where the trial has become another
        command's.
        """
        if not self.study.owns(running.trial):
            raise ClaimLost("another command has taken it over while this one was cut off")
        outcome = running.recording.conclude(message)
        if self.study.sweep.study.early_stop and outcome.state == "complete":
            running.trial.remember(running.recording.curve)
        self.study.tell(running.trial.number, outcome)
        self.checkpoints.remove(_name(running.trial))
        return outcome

    def _broke(self, assigned: _Assigned, failure: Broke) -> Generator[TrialEvent, None, None]:
        """A job broke off by itself: its trials are tried again, or the worker goes with it."""
        if failure.surroundings:
            if len(self.pool.workers) == 1:
                self._release(assigned, failure.why)
                raise failure.error or KdexpError(failure.why)
            assigned.worker.retire()
            yield from self._died(assigned.worker, failure.why, failure.trace)
            return
        yield from self._failed(self._release(assigned, failure.why, "failed"), failure)

    def _failed(self, trials: Sequence[Trial], failure: Broke) -> Generator[TrialEvent, None, None]:
        log.debug("a trial failed\n%s", failure.trace)
        self._stop_where_all_fail(failure, trials[0])
        for trial in trials:
            yield TrialFailed(trial.number, failure.why)

    def _stop_where_all_fail(self, failure: Broke, trial: Trial) -> None:
        """Raises TrialsFail for a failure that is no single trial's: it befalls the file's own
        recipe before anything has been trained to its end, and comes from a network of the user's
        own, or for the second time. Retries are left for when it is mended.
        """
        shared = trial.control and not self.study.done and not failure.memory
        if shared and (failure.own or failure.why in self.failures):
            mend = "Correct the network" if failure.own else "Mend that"
            raise TrialsFail(
                f"Every trial would fail as this one: {failure.why}. {mend} and give the same"
                " command again: it goes on from here."
            ) from failure.error
        self.failures.append(failure.why)

    def _died(self, worker: Worker, why: str, trace: str) -> Generator[TrialEvent, None, None]:
        trials = list[Trial]()
        if worker.job and (assigned := self.assigned.get(worker.job.number)):
            trials = self._release(assigned, how="failed")
        event = WorkerLost(worker.number, tuple(sorted(trial.number for trial in trials)), why)
        self.lost.append((event, trace))
        yield event

    def _release(
        self,
        assigned: _Assigned,
        why: BaseException | str | None = None,
        how: HandedBack = "released",
    ) -> list[Trial]:
        """A job is over; its trials that did not end are handed back, with a reason where it broke
        off.
        """
        self.assigned.pop(assigned.job.number)
        assigned.worker.job = None
        for running in assigned.trials.values():
            running.recording.close(why)
            self.study.hand_back(running.trial, how)
        return [running.trial for running in assigned.trials.values()]

    # --- on the way out ---

    def _check_left(self) -> None:
        """Raises WorkersGone where trials are left that nobody here can train, NoMore where nobody
        is to.
        """
        left = self.study.left
        if left and (self.late or self.stopped):
            why = "the time is nearly up" if self.late else "kdexp stop has asked for it"
            name = self.study.sweep.name
            raise NoMore(f"{left} trials of study '{name}' are left, and {why}.", self.late)
        if not (self.lost and left and not self.pool.living):
            return
        causes = "; ".join(str(event) for event, _ in self.lost)
        error = WorkersGone(
            f"{left} trials of study '{self.study.sweep.name}' are not finished: {causes}."
        )
        for _, trace in self.lost:
            error.add_note(trace)
        raise error

    def _hand_all_back(self, error: BaseException | None) -> None:
        """What was begun and did not end, and what was not begun, is left to others."""
        for assigned in list(self.assigned.values()):
            self._release(assigned, error)
        for claimed in self.waiting:
            self.study.hand_back(claimed.trial, "released")


def leave(study: OpenStudy, tracking: Tracking, claimant: Claimant, finished: bool) -> int:
    """How many trials others have under way; with none, the study's run is closed.

    Called once its own trials are ended or handed back, so that of several that stop together the
    last one sees nobody.
    """
    if finished:
        return _leave(study, tracking, claimant, "FINISHED")
    # nobody waits on the way out; why we leave is what is to be heard
    with tracking.at_once(), suppress(Exception):
        return _leave(study, tracking, claimant, "KILLED")
    return 0


def _leave(
    study: OpenStudy, tracking: Tracking, claimant: Claimant, status: Literal["FINISHED", "KILLED"]
) -> int:
    others = study.others(claimant, patient=status == "FINISHED")
    if not others:
        tracking.finish(study.parent_run, status)
    return others


def finished(work: Generator[object, None, T]) -> T:
    """What a generator comes to, its progress unseen."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def _alike(recipe: Recipe) -> tuple[str, ...]:
    """What new trials must share to train as one."""
    return (Lane.of(recipe).fuse_key, f"fold {recipe.data.fold}")


def _started(claimed: _Claimed) -> TrialStarted:
    epoch = claimed.checkpoint.snapshot.epoch if claimed.checkpoint else 0
    trial = claimed.trial
    return TrialStarted(trial.number, trial.recipe, trial.retried, epoch, trial.repeats)


def _name(trial: Trial) -> str:
    return f"trial-{trial.number}"


def _tags(number: int, study: OpenStudy) -> dict[str, str]:
    """What finds the runs of a trial."""
    return {"mlflow.parentRunId": study.parent_run, "kdexp.trial": str(number)}


def _outcome(number: int, study: OpenStudy, bench: Bench) -> Outcome | None:
    """What came of a trial whose command is gone; where it did not end, whatever runs it left open
    are closed.
    """
    tracking = bench.tracking
    for run in tracking.find("trial", _tags(number, study), bench.experiment_id):
        if run.status == "FINISHED":
            return Outcome.recorded(run)
        if run.status == "RUNNING":
            tracking.tag(
                run.run_id, {"kdexp.state": "interrupted", "kdexp.error": "its worker is gone"}
            )
            tracking.finish(run.run_id, "KILLED")
    return None
