"""One process's part of a study: trials one after another, or fused, from Optuna's choice to a finished run, as events.

Whatever stops it (Ctrl-C, kill -9, a full disk) leaves finished trials finished, and the trial that was under
way to the next process that looks for one. Events are small and can be pickled: they travel between processes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch

from kdexp import KdexpError
from kdexp.claims import Claimant, ClaimLost
from kdexp.config import Recipe
from kdexp.distill.checkpoints import Checkpoint, Checkpoints
from kdexp.distill.execution import choose
from kdexp.distill.models import ModelError, Size, measure, outline
from kdexp.distill.packs import Execution, Lane
from kdexp.distill.train import EpochReport, Snapshot, epochs_of, train, whole_epochs
from kdexp.own import own_line
from kdexp.runner import Prepared, Result, goes_on_here, started
from kdexp.selection import size_of
from kdexp.settings import first_line, in_one_line, without_credentials
from kdexp.study import Ended, OpenStudy, Trial
from kdexp.surroundings import out_of_memory
from kdexp.tracking import Tracking

__all__ = [
    "EpochDone",
    "TrialEvent",
    "TrialFailed",
    "TrialFinished",
    "TrialGivenUp",
    "TrialSkipped",
    "TrialStarted",
    "leave",
    "run_trials",
]

log = logging.getLogger("kdexp")


class TrialsFail(KdexpError):
    """A failure that all trials of a study share."""


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins; where `retried`, it goes on after this epoch, or begins again at 0."""

    number: int
    recipe: Recipe
    retried: bool
    epoch: int = 0


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
    """A proposal was not worth training, and why: it is none of the study's trials."""

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
    """A trial broke off by itself, and why; it will be tried again."""

    number: int
    why: str


TrialEvent = TrialStarted | EpochDone | TrialFinished | TrialFailed | TrialGivenUp | TrialSkipped


def run_trials(
    study: OpenStudy,
    prepared: Prepared,
    tracking: Tracking,
    experiment_id: str,
    claimant: Claimant,
    checkpoints: Checkpoints,
    pack: int = 1,
) -> Generator[TrialEvent, None, None]:
    """Train trials until there is none left to begin or to take over. Close the generator to stop cleanly.

    With `pack` above 1, so many trials are asked for at once, and those that can be fused train as one batch.
    """
    here = _Here(study, prepared, tracking, experiment_id, claimant, checkpoints, pack)
    with here.handing_back():
        while group := here.next_group():
            yield from here.news()
            yield from _run_pack(group, here)
        yield from here.news()


def leave(study: OpenStudy, tracking: Tracking, claimant: Claimant, finished: bool) -> int:
    """How many trials others have under way; with none, the study's run is closed.

    Called once its own trials are ended or handed back, so that of several that stop together the last one sees nobody.
    """
    if finished:
        return _leave(study, tracking, claimant, "FINISHED")
    with tracking.at_once(), suppress(Exception):  # on the way out nobody waits; why we leave is what is to be heard
        return _leave(study, tracking, claimant, "KILLED")
    return 0


def _leave(study: OpenStudy, tracking: Tracking, claimant: Claimant, status: Literal["FINISHED", "KILLED"]) -> int:
    others = study.others(claimant, patient=status == "FINISHED")
    if not others:
        tracking.finish(study.parent_run, status)
    return others


@dataclass(frozen=True)
class _Begun:
    """A trial to train, and from where: its checkpoint, if it has one that goes on here."""

    trial: Trial
    checkpoint: Checkpoint | None

    @cached_property
    def lane(self) -> Lane:
        """How it is trained."""
        return Lane.of(self.trial.recipe)

    @cached_property
    def key(self) -> tuple[str, ...]:
        """What trials must agree in to train as one: their fuse key; and those that go on, all but their places."""
        if self.checkpoint is None:
            return (self.lane.fuse_key,)
        how, _ = Execution.recorded(self.checkpoint.environment)
        together = how.shared or self.lane.training.max_steps  # which may cut their last epoch short
        epoch = self.checkpoint.snapshot.epoch if together else ""
        return (self.lane.fuse_key, repr(how), self.checkpoint.environment["threads"], str(epoch))

    @property
    def place(self) -> int | None:
        """The place it must have; None: any."""
        return Execution.recorded(self.checkpoint.environment)[1] if self.checkpoint else None


@dataclass(frozen=True)
class _Here:
    """This process's part of a study, and the trials it has asked for and not begun."""

    study: OpenStudy
    prepared: Prepared
    tracking: Tracking
    experiment_id: str
    claimant: Claimant
    checkpoints: Checkpoints
    pack: int
    waiting: list[_Begun] = field(default_factory=list)
    starting: list[_Begun] = field(default_factory=list)
    """Taken to be trained, without a seat yet."""
    not_begun: list[TrialSkipped | TrialGivenUp] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Of trials that broke off by themselves, in words."""

    def next_group(self) -> list[_Begun]:
        """The next trials that can train as one: asked for together, of one key."""
        while len(self.waiting) < self.pack and (begun := self._ask()):
            self.waiting.append(begun)
        return self._take(self.waiting[0].key, self.pack) if self.waiting else []

    def next_like(self, key: tuple[str, ...]) -> _Begun | None:
        """One more trial of a key; one of another key waits for the next pack."""
        if not any(begun.key == key for begun in self.waiting) and (begun := self._ask()):
            self.waiting.append(begun)
        return next(iter(self._take(key, 1)), None)

    def _take(self, key: tuple[str, ...], count: int) -> list[_Begun]:
        taken: list[_Begun] = []
        for begun in self.waiting:
            free = begun.place is None or begun.place not in [other.place for other in taken]
            if begun.key == key and free and (len(taken) < count or begun.place is not None):
                taken.append(begun)
        self.waiting[:] = [begun for begun in self.waiting if begun not in taken]
        self.starting.extend(taken)
        return taken

    def stop_where_all_fail(self, error: Exception, trial: Trial) -> None:
        """Raises TrialsFail for a failure that is no single trial's: it befalls the file's own recipe before anything has been
        trained to its end, and comes from a network of the user's own, or for the second time. Retries are left for when
        it is mended."""
        if _surroundings_fail(type(error)):
            return
        why, own = _why(error, trial.recipe), _own_line(error, trial.recipe)
        shared = trial.control and not self.study.done and not out_of_memory(error)
        if shared and (own or why in self.failures):
            raise TrialsFail(
                f"Every trial would fail as this one: {why}. {'Correct the network' if own else 'Mend that'} and give the "
                f"same command again: it goes on from here."
            ) from error
        self.failures.append(why)

    def news(self) -> list[TrialSkipped | TrialGivenUp]:
        """What was not begun since this was last asked."""
        news = list(self.not_begun)
        self.not_begun.clear()
        return news

    @contextmanager
    def handing_back(self) -> Iterator[None]:
        """On the way out, what was asked for and not begun is left to others."""
        try:
            yield
        finally:
            for begun in (*self.waiting, *self.starting):
                self.study.hand_back(begun.trial, "released")

    def _ask(self) -> _Begun | None:
        """The next trial that is worth its training."""
        while trial := self.study.next_trial(self.claimant, self._ended):
            try:
                if begun := self._worth_training(trial):
                    return begun
            except BaseException:
                self.study.hand_back(trial, "released")
                raise
        return None

    def _ended(self, number: int) -> Ended | None:
        return _ended(number, self.study, self.tracking, self.experiment_id)

    def _worth_training(self, trial: Trial) -> _Begun | None:
        checkpoint = self._checkpoint(trial)
        if why := self._given_up(trial, checkpoint):
            self.not_begun.append(TrialGivenUp(trial.number, trial.recipe, why, self.study.done))
        elif why := self._needless(trial):
            self.study.skip(trial, why)
            self.not_begun.append(TrialSkipped(trial.number, trial.recipe, why))
        else:
            return _Begun(trial, checkpoint)
        return None

    def _checkpoint(self, trial: Trial) -> Checkpoint | None:
        found = self.checkpoints.load(_name(trial)) if trial.retried else None
        if found and goes_on_here(found, trial.recipe, self.prepared) and self.tracking.there(found.run_id):
            return found
        return None

    def _given_up(self, trial: Trial, checkpoint: Checkpoint | None) -> str:
        if not trial.broken:
            return ""
        tries, retries = trial.tries(checkpoint.snapshot.epoch if checkpoint else 0), self.study.sweep.study.retries
        if tries <= retries:
            return ""
        runs = self.tracking.find("trial", _tags(trial.number, self.study), self.experiment_id)
        last = next((run.tags["kdexp.error"] for run in reversed(runs) if run.tags.get("kdexp.error")), "its worker was killed")
        why = f"broke {tries} times without getting on (study.retries: {retries}): {last}"
        for run in runs:
            self.tracking.tag(run.run_id, {"kdexp.state": "failed", "kdexp.error": why[:500]})
            self.tracking.finish(run.run_id, "FAILED")
        self.study.give_up(trial, why)
        self.checkpoints.remove(_name(trial))
        return why

    def _needless(self, trial: Trial) -> str:
        if trial.control or trial.begun:
            return ""
        like = self.prepared.splits.train
        try:
            size = measure(outline(trial.recipe.student, like), like)
        except ModelError as error:  # each choice can be built, not every combination of them
            return str(error)
        if why := self.study.needless(size):
            return why
        same = self.study.repeated(trial)
        return self._repeats(trial, size) if same is None else f"trial {same} trains the same"

    def _repeats(self, trial: Trial, size: Size) -> str:
        """That an earlier trial trains nearly the same, or nothing. In a search for the smallest a smaller student is new."""
        rule, like = self.study.sweep.selection, self.prepared.splits.train
        for number, recipe in self.study.like(trial).items():
            other = measure(outline(recipe.student, like), like)
            if self.study.sweep.study.objective != "smallest" or size_of(size, rule.size) >= size_of(other, rule.size):
                return f"trial {number} trains nearly the same"
        return ""


class _Seat:
    """A trial under way in one place of a pack: its run is open until it leaves, or until all are closed."""

    def __init__(self, begun: _Begun, here: _Here, how: Execution, place: int, everyone: ExitStack) -> None:
        self.trial, self.checkpoint, self.here, self.left = begun.trial, begun.checkpoint, here, False
        everyone.push(self._tidy)
        here.starting.remove(begun)
        self.stack = everyone.enter_context(ExitStack())
        trial = begun.trial
        self.running = self.stack.enter_context(
            started(
                trial.recipe,
                here.prepared,
                here.tracking,
                here.experiment_id,
                "trial",
                " · ".join(filter(None, [f"trial {trial.number}", trial.control])),
                parent=here.study.parent_run,
                tags=_tags(trial.number, here.study) | {"kdexp.study": here.study.sweep.name},
                params={"trial": trial.number},
                how=how,
                place=place,
                keep=partial(here.checkpoints.save, _name(trial)),
                resumed=begun.checkpoint,
            )
        )
        trial.link(self.running.run_id)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train: it was interrupted between its last epoch and its end."""
        epochs = epochs_of(self.trial.recipe.training, len(self.here.prepared.splits.train))
        done = self.checkpoint.snapshot.epoch if self.checkpoint else 0
        return self.running.state != "complete" or done == epochs

    def _tidy(self, kind: type[BaseException] | None, *_: object) -> None:
        """Broken off: its run is closed, also one that MLflow had made but not yet handed to us; the trial is handed back."""
        if kind is None or self.left:
            return
        with self.here.tracking.at_once(), suppress(KdexpError):
            _ended(self.trial.number, self.here.study, self.here.tracking, self.here.experiment_id)
        own = issubclass(kind, Exception) and not _surroundings_fail(kind)
        self.here.study.hand_back(self.trial, "failed" if own else "released")

    def take(self, report: EpochReport) -> bool:
        """Record an epoch; whether it was the trial's last."""
        self.running.record(report)
        if self.running.state == "complete" and (self.trial.report(report) or self._pointless(report)):
            self.running.state = "pruned"
        self.running.settle(report)
        return self.running.state != "complete" or report.epoch == report.epochs

    def leave(self) -> TrialFinished | TrialFailed:
        """Close the run, then tell Optuna. A trial that has become another command's is dropped."""
        try:
            return self._leave()
        except ClaimLost as error:
            return self._dropped(error)

    def _leave(self) -> TrialFinished:
        if not self.here.study.owns(self.trial):
            raise ClaimLost("another command has taken it over while this one was cut off")
        self.stack.close()
        result, samples = self.running.result, len(self.here.prepared.splits.validation)
        assert result is not None
        if self.here.study.sweep.study.early_stop and result.state == "complete":
            self.trial.remember(self._curve())
        self.here.study.tell(self.trial.number, Ended(result.state, result.val_accuracy, samples, result.size))
        self.here.checkpoints.remove(_name(self.trial))
        self.left = True
        return TrialFinished(self.trial.number, result, self.here.study.done)

    def _dropped(self, error: ClaimLost) -> TrialFailed:
        """Take back what was recorded: of each trial one training is accepted, and it is not this one."""
        self.left = True
        self.here.study.hand_back(self.trial, "released")  # which it no longer is: nothing but our own memory of it
        why = f"{error}; what was trained of it here is dropped"
        with suppress(ClaimLost), self.stack:  # its run is closed as broken off, where it is still open
            raise error
        with suppress(KdexpError):
            self.here.tracking.tag(self.running.run_id, {"kdexp.state": "interrupted", "kdexp.error": why})
            self.here.tracking.finish(self.running.run_id, "KILLED")
        return TrialFailed(self.trial.number, why)

    def _pointless(self, report: EpochReport) -> bool:
        study, samples = self.here.study, len(self.here.prepared.splits.validation)
        if not study.sweep.study.early_stop or self.trial.control or report.epoch == report.epochs:
            return False
        return study.pointless(self.running.size, self._curve(), report.epochs, samples)

    def _curve(self) -> list[float]:
        return [row["val_accuracy"] for row in self.running.history]


def _surroundings_fail(kind: type[BaseException]) -> bool:
    """Whether a failure is no trial's fault, as a full disk or a server that is gone. A network that cannot be trained is."""
    return issubclass(kind, KdexpError | OSError) and not issubclass(kind, ModelError)


def _run_pack(group: Sequence[_Begun], here: _Here) -> Generator[TrialEvent, None, None]:
    """Train these trials together. Where trials are pruned, others of their kind take over the free places."""
    seats: dict[int, _Seat] = {}
    try:
        with ExitStack() as everyone:
            try:
                yield from _train_pack(group, here, seats, everyone)
            except Exception as error:
                here.stop_where_all_fail(error, group[0].trial)
                raise
    except Exception as error:
        if _surroundings_fail(type(error)):
            raise
        log.debug("a trial failed", exc_info=True)
        for begun in here.starting:
            here.study.hand_back(begun.trial, "failed")
        for trial in (*(seat.trial for seat in seats.values()), *(begun.trial for begun in here.starting)):
            yield TrialFailed(trial.number, _why(error, trial.recipe))
        here.starting.clear()


def _train_pack(
    group: Sequence[_Begun], here: _Here, seats: dict[int, _Seat], everyone: ExitStack
) -> Generator[TrialEvent, None, None]:
    prepared, first = here.prepared, group[0]
    samples = len(prepared.splits.train)
    for begun in group:
        yield _started(begun)
    free = here.study.prunes and whole_epochs(first.lane.training, samples) and prepared.teacher.soft.per == "view"
    refill = len(group) > 1 and free
    if first.checkpoint:
        how = Execution.recorded(first.checkpoint.environment)[0]
        everyone.enter_context(_threads(int(first.checkpoint.environment["threads"])))
        refill = not how.shared and free
    else:
        how = choose([begun.lane for begun in group], prepared.splits.train, refill)
    lanes: list[Lane | None] = [None] * how.lanes
    resumed: list[Snapshot | None] = [None] * how.lanes
    for number, begun in enumerate(group):
        place = number if begun.place is None else begun.place
        seats[place] = _Seat(begun, here, how, place, everyone)
        lanes[place], resumed[place] = begun.lane, begun.checkpoint.snapshot if begun.checkpoint else None
        if seats[place].over:
            yield seats.pop(place).leave()
            lanes[place] = resumed[place] = None
    if not seats:
        return
    training = train(lanes, prepared.splits, prepared.data, prepared.teacher.soft, how, resumed=resumed)
    changes: dict[int, Lane | None] | None = None
    while seats:
        reports, changes = training.send(changes), {}
        for place, seat in list(seats.items()):
            report = reports[place]
            assert report is not None
            last = seat.take(report)
            yield EpochDone(seat.trial.number, report.numbers)
            if last:
                yield seats.pop(place).leave()
                changes[place] = None
                if refill and (successor := here.next_like(_fresh_key(lanes))):
                    yield _started(successor)
                    seats[place] = _Seat(successor, here, how, place, everyone)
                    changes[place] = successor.lane
    training.close()


def _started(begun: _Begun) -> TrialStarted:
    epoch = begun.checkpoint.snapshot.epoch if begun.checkpoint else 0
    return TrialStarted(begun.trial.number, begun.trial.recipe, begun.trial.retried, epoch)


def _fresh_key(lanes: Sequence[Lane | None]) -> tuple[str, ...]:
    """The key of trials from their beginning that can join these lanes."""
    return (next(lane for lane in lanes if lane).fuse_key,)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """In here so many CPU threads: another number would sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _why(error: Exception, recipe: Recipe) -> str:
    """Why a trial broke off: where a network of the user's own is at fault, with the line of it."""
    own = _own_line(error, recipe)
    return f"{type(error).__name__}: {without_credentials(first_line(error))} ({own})" if own else in_one_line(error)


def _own_line(error: Exception, recipe: Recipe) -> str:
    return own_line(error) if ":" in recipe.student.architecture else ""


def _name(trial: Trial) -> str:
    return f"trial-{trial.number}"


def _tags(number: int, study: OpenStudy) -> dict[str, str]:
    """What finds the runs of a trial."""
    return {"mlflow.parentRunId": study.parent_run, "kdexp.trial": str(number)}


def _ended(number: int, study: OpenStudy, tracking: Tracking, experiment_id: str) -> Ended | None:
    """How a trial ended whose worker is gone; where it did not, whatever runs it left open are closed."""
    for run in tracking.find("trial", _tags(number, study), experiment_id):
        if run.status == "FINISHED":
            size = Size(*(int(run.metrics[name]) for name in ("parameters", "multiply_adds", "model_bytes")))
            accuracy, samples = run.metrics["val_accuracy"], int(run.metrics.get("val_samples", 0))
            return Ended(run.tags["kdexp.state"], accuracy, samples, size)  # type: ignore[arg-type]
        if run.status == "RUNNING":
            tracking.tag(run.run_id, {"kdexp.state": "interrupted", "kdexp.error": "its worker is gone"})
            tracking.finish(run.run_id, "KILLED")
    return None
