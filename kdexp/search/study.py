"""Optuna: a study on a storage, its controls, its trials, its verdicts.

Trial 0 is the recipe's own values, trial 1 the same with alpha = 0: every study holds its baseline
and its labels-only control. Optuna chooses what no trial has yet; who trains it is settled by
kdexp.search.claims, so that any number of commands may run the same study, and what was interrupted
keeps its trial number.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from kdexp.config import (
    CONTROLS,
    Objective,
    Recipe,
    Selection,
    Sweep,
    differences,
    recorded,
)
from kdexp.distill.checkpoints import Checkpoints
from kdexp.distill.models import Size
from kdexp.distill.randomness import seed_of
from kdexp.distill.train import EpochReport
from kdexp.files import write_ahead
from kdexp.repeats import Measure, Plan, Repeated, next_repeat
from kdexp.repeats import Verdict as Sureness
from kdexp.repeats import verdict as sureness
from kdexp.repeats import verdicts as surenesses
from kdexp.runs.outcome import Outcome
from kdexp.search.claims import Claimant, ClaimLost, HandedBack, Held, Standing
from kdexp.search.objective import (
    DIRECTIONS,
    Passing,
    compared,
    constraints,
    dominated,
    unsure,
    values,
    worst,
)
from kdexp.search.space import (
    fresh_values,
    learns_alike,
    nearly_alike,
    recipe_value,
    stored_value,
    suggest,
)
from kdexp.search.stopping import futile
from kdexp.search.storage import AWAY, StudyError, answered, away, open_storage, stored_name
from kdexp.selection import of_one, plan_of, size_of
from kdexp.settings import Settings, without_credentials

__all__ = []

# trials before the Gaussian process takes over, the controls among them: with 10, half of a small
# budget is random
STARTUP = 5
# proposals in a row that were not worth training: from then on they are drawn at random ...
STUBBORN = 3
# in vain: what is nearly a repeat is then trained, the space may hold nothing else
NARROW = STUBBORN + 20
# ... and so many end the study; what one draw in 20 finds is overlooked with a probability of 0.6 %
IN_VAIN = STUBBORN + 100
# a sixteenth of the trainings repeats each control
COMPARED = 16
SET_UP_SECONDS = 30.0
LAST = 20  # trials, for how long one takes
STOPS = "stops"  # the attribute that counts how often a study was asked to stop
log = logging.getLogger("kdexp")


@dataclass(frozen=True)
class Told:
    """What Optuna holds of a trial that has ended: what steers the search. Verdicts rest on the
    trial's own run.
    """

    values: tuple[float, ...]
    limits: Mapping[str, float]
    recipe: Recipe | None
    curve: Sequence[float] | None
    measured: Measure | None
    """What a verdict on its recipe goes by, where trials are repeated."""
    repeats: int | None
    """The trial whose recipe it repeats."""


@dataclass(frozen=True)
class Begun:
    """A study that Optuna's storage knows."""

    parent_run: str
    """Its MLflow run."""
    done: int
    """How many of its trials have ended."""
    facts: Mapping[str, Any]
    """What its trials share, by name: the hashes of data and teacher."""
    sweep: Sweep
    """The sweep file that it goes on with."""


@dataclass(frozen=True)
class UnderWay:
    """A trial that has begun and not ended."""

    number: int
    repeats: int | None
    """The trial whose recipe it trains again."""
    state: Literal["held", "doubtful", "free"]
    """Whether the command that has it lives; free: it waits for one."""
    command: str
    """Its claimant; empty where there is none."""


@dataclass(frozen=True)
class Trial:
    """One trial that this process is to train: Optuna's choice as a recipe."""

    number: int
    recipe: Recipe
    control: str
    """'documented defaults', 'labels only', or nothing."""
    retried: bool
    begun: bool
    """Retried, and its training had begun: it had a run."""
    broken: bool
    """Retried because its worker died, or because it failed: not because it was stopped."""
    repeats: int | None
    """The trial whose recipe it trains again, with another seed on another fold ..."""
    repeat: int
    """... and which of its repeats this is, from 1; 0: it is none."""
    _aim: Objective
    _prunes: bool
    _trial: optuna.Trial
    _reported: frozenset[int]

    @property
    def trains_a_control(self) -> bool:
        """Whether its recipe is that of a control: two that are compared are trained to the end."""
        return bool(self.control) or self.repeats in range(CONTROLS)

    def link(self, run_id: str) -> None:
        """Let Optuna know the trial's MLflow run."""
        answered(lambda: self._trial.set_user_attr("run_id", run_id))

    def remember(self, curve: Sequence[float]) -> None:
        """Let the study's other trials learn from this one, which went to its end."""
        answered(lambda: self._trial.set_user_attr("outcome", {"curve": list(curve)}))

    def tries(self, epoch: int) -> int:
        """How often it has broken without getting beyond this epoch, now included."""
        before = self._trial.user_attrs.get("broken", {"times": 0, "epoch": epoch})
        times = before["times"] + 1 if before["epoch"] == epoch else 1
        answered(lambda: self._trial.set_user_attr("broken", {"times": times, "epoch": epoch}))
        return times

    def report(self, report: EpochReport) -> bool:
        """Tell Optuna an epoch's validation accuracy, if it is to prune; whether it does so now."""
        if not self._prunes or not _heard(report.epoch, report.epochs):
            return False
        try:
            if report.finite and report.epoch not in self._reported:
                self._trial.report(compared(self._aim, report.val_accuracy), report.epoch)
            # Optuna judges by the last epoch it knows: wait until a retried trial is there again.
            known = report.epoch >= max(self._reported, default=0)
            return (
                known
                and self.number >= CONTROLS
                and self.repeats is None  # what is left out is no fair sample
                and report.epoch < report.epochs
                and self._trial.should_prune()
            )
        except AWAY:  # training does not wait; the next epoch that Optuna hears of decides
            return False


@dataclass(frozen=True)
class _Claimed:
    """A trial's claim, and whose it is in this process."""

    claimant: Claimant
    held: Held


class OpenStudy:
    """A handle to one study, for one sweep file."""

    def __init__(self, study: optuna.Study, sweep: Sweep, folds: int = 1) -> None:
        self._study, self.sweep, self._folds = study, sweep, folds
        self._aim = sweep.study.objective
        self._stops = study.user_attrs.get(STOPS, 0)
        self._claims: dict[int, _Claimed] = {}
        """Of trials that this process has taken, by number."""
        self._recipes: dict[int, Recipe] = {}
        """Of trials, by number."""

    @property
    def parent_run(self) -> str:
        """The id of the study's MLflow run."""
        return str(self._study.user_attrs["mlflow_run_id"])

    def checkpoints(self, settings: Settings) -> Checkpoints:
        """Where this study's trials under way are kept."""
        return Checkpoints(settings.stores / "checkpoints" / self.parent_run)

    @property
    def prunes(self) -> bool:
        """Whether trials may be ended early."""
        return self.sweep.study.pruner != "none" or self.sweep.study.early_stop

    @property
    def smallest(self) -> Passing | None:
        """The smallest that passes, where that is what is searched for."""
        return self._smallest(answered(self._trained))

    @property
    def done(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in answered(self._trained))

    @property
    def stopped(self) -> bool:
        """Whether somebody has asked, since this was opened, that no more trials are begun."""
        return bool(answered(lambda: self._study.user_attrs.get(STOPS, 0)) > self._stops)

    def stop(self) -> None:
        """Ask that of every command that has the study open now."""
        answered(lambda: self._study.set_user_attr(STOPS, self._stops + 1))

    @property
    def skipped(self) -> int:
        """How many proposals were not worth training."""
        return sum("skipped" in trial.user_attrs for trial in self._trials())

    @property
    def given_up(self) -> int:
        """How many trials broke too often."""
        return sum("given_up" in trial.user_attrs for trial in answered(self._trials))

    @property
    def seconds_a_trial(self) -> float | None:
        """From a trial's begin to its end: the median of the last ones, by the clocks of those who
        trained them. None while there is none.
        """
        ended = [trial.duration for trial in answered(self._trained) if trial.values]
        seconds = [each.total_seconds() for each in ended if each is not None]
        return median(seconds[-LAST:]) if seconds else None

    def at_work(self, claimant: Claimant) -> list[UnderWay]:
        """The trials that have begun and not ended, and who has them."""
        return [
            UnderWay(
                trial.number,
                trial.user_attrs.get("repeats"),
                standing.state,
                standing.claim.claimant
                if standing.claim and not standing.claim.handed_back
                else "",
            )
            for trial, standing in answered(lambda: self._under_way(claimant))
        ]

    @property
    def left(self) -> int:
        """How many trials are still to end."""
        return (answered(self._begun) if self.exhausted else self.sweep.study.trials) - self.done

    @property
    def exhausted(self) -> bool:
        """Whether so many proposals in a row were not worth training that no more are made, and
        nothing is left to repeat.
        """
        return answered(lambda: self._untrained() >= IN_VAIN and self._to_repeat() is None)

    def next_trial(
        self, claimant: Claimant, ended: Callable[[int], Outcome | None]
    ) -> Trial | None:
        """The next trial to train: one whose claimant is gone, else a new one; None where the
        budget is used up.

        `ended` says of a trial whose claimant is gone how it ended, if it did (and cleans up after
        it if not).
        """
        while True:
            trial = answered(lambda: self._next(claimant))
            if trial is None:
                if not self._in_doubt(claimant):
                    return None
                time.sleep(1)
            elif not trial.retried or not self._has_ended(trial, ended):
                return trial

    def _has_ended(self, trial: Trial, ended: Callable[[int], Outcome | None]) -> bool:
        """Whether a trial that was taken over had come to its end: then it only remains to be
        told.
        """
        try:
            verdict = ended(trial.number)
        except BaseException:
            self.hand_back(trial, "released")
            raise
        if verdict:
            with suppress(ClaimLost):  # whoever has it now finds the same
                self.tell(trial.number, verdict)
        return verdict is not None

    def _next(self, claimant: Claimant) -> Trial | None:
        with claimant.turn:
            for frozen, standing in self._under_way(claimant):
                if standing.state == "free" and self._take_over(frozen, standing, claimant):
                    left = _left(frozen, standing)
                    # Optuna documents ask() only. To go on with an interrupted trial under its old
                    # number, the Trial is built from its id.
                    self._study.sampler = _sampler(
                        self.sweep, frozen.number, self._untrained(frozen.number)
                    )
                    return self._chosen(optuna.Trial(self._study, frozen._trial_id), frozen, left)
            return self._ask(claimant)

    def _ask(self, claimant: Claimant) -> Trial | None:
        """A new trial, where the budget has one left."""
        untrained = self._untrained()
        if self._begun() >= self.sweep.study.trials:
            return None
        waits = self._waits
        number = None if waits else self._to_repeat()
        if number is not None:
            self._enqueue_repeat(number)
        elif untrained >= IN_VAIN and not waits:
            return None
        # what is repeated is known: nothing is to be chosen
        vain = untrained if number is None else STUBBORN
        self._study.sampler = _sampler(self.sweep, self._next_number(), vain)
        trial = self._study.ask()
        # Another machine, which the turn does not hold back, may have asked at the same moment.
        too_many = self._begun(before=trial.number) >= self.sweep.study.trials
        if too_many or self._is_repeated(trial):
            trial.set_user_attr("over_budget", True)
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        standing = claimant.look([name := _claim_of(trial._trial_id)])[name]
        held = claimant.take(name, standing.claim) if standing.state != "held" else None
        # this process stood still for so long after it asked that the trial was thought abandoned
        if held is None:
            return self._ask(claimant)
        self._claims[trial.number] = _Claimed(claimant, held)
        return self._chosen(trial, None, None)

    def _take_over(self, frozen: FrozenTrial, standing: Standing, claimant: Claimant) -> bool:
        """Whether an abandoned trial is this claimant's now, and still to be trained."""
        held = claimant.take(_claim_of(frozen._trial_id), standing.claim)
        if held is None:
            return False
        if self._study.get_trials(deepcopy=False)[frozen.number].state != TrialState.RUNNING:
            return False  # its former claimant had told it and gone meanwhile
        self._claims[frozen.number] = _Claimed(claimant, held)
        return True

    def _under_way(self, claimant: Claimant) -> list[tuple[FrozenTrial, Standing]]:
        """The trials that have begun and not ended, and how their claims stand."""
        running = [trial for trial in self._trials() if trial.state == TrialState.RUNNING]
        standings = claimant.look([_claim_of(trial._trial_id) for trial in running])
        return [(trial, standings[_claim_of(trial._trial_id)]) for trial in running]

    def _in_doubt(self, claimant: Claimant) -> bool:
        """Whether some trial's claimant may be gone: a little more patience will tell."""
        return any(
            standing.state != "held" for _, standing in answered(lambda: self._under_way(claimant))
        )

    def dominated(self, size: Size) -> str:
        """Why a student of this size need not be trained, or nothing."""
        return self._dominated(size, answered(self._trained))

    def futile(
        self,
        size: Size,
        curve: Sequence[float],
        epochs: int,
        samples: int,
        is_repeat: bool = False,
    ) -> bool:
        """Whether a trial under way can no longer be selected, by its validation accuracies so far
        (on so many images). A repeat is not ended by these: the mean would be of the better ones.

        Asked between two epochs: training does not wait for a database that is away, the next epoch
        asks again.
        """
        try:
            trials = self._trained()
        except AWAY:
            return False
        if self._dominated(size, trials):
            return True
        return not is_repeat and futile(curve, self._rule, _curves(trials), epochs, samples)

    def _dominated(self, size: Size, trials: Sequence[FrozenTrial]) -> str:
        rule = self.sweep.selection
        return dominated(self._aim, size_of(size, rule.size), rule, self._smallest(trials))

    def _smallest(self, trials: Sequence[FrozenTrial]) -> Passing | None:
        if self.sweep.repeats:
            every = self._sure(self._repeated(trials))
            sure = (Passing(recipe.trial, recipe.size) for recipe in every)
            return min(sure, key=lambda passing: (passing.size, passing.trial), default=None)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        passing = [
            trial
            for trial in complete
            if trial.constraints and max(trial.constraints.values()) <= 0
        ]
        sizes = [Passing(trial.number, int(trial.values[0])) for trial in passing]
        return min(sizes, key=lambda other: (other.size, other.trial), default=None)

    def repeated(self, trial: Trial) -> int | None:
        """The number of an earlier trial that learns just what this one would; None where it is
        new.
        """
        earlier = (
            (other.number, self._recipe(other))
            for other in answered(self._trained)
            if other.number < trial.number
        )
        return next(
            (number for number, recipe in earlier if recipe and learns_alike(recipe, trial.recipe)),
            None,
        )

    def like(self, trial: Trial) -> dict[int, Recipe]:
        """The earlier trials that this one would nearly repeat, by number. After many proposals in
        vain such are welcome.
        """
        if answered(lambda: self._untrained(trial.number)) >= NARROW:
            return {}
        earlier = {
            other.number: self._recipe(other)
            for other in answered(self._trained)
            if other.number < trial.number
        }
        return {
            n: recipe
            for n, recipe in earlier.items()
            if recipe and nearly_alike(recipe, trial.recipe, self.sweep.search)
        }

    # --- repeats ---

    @property
    def _rule(self) -> Selection:
        """By which one training is judged."""
        return of_one(self.sweep)

    @property
    def _plan(self) -> Plan:
        return plan_of(self.sweep.study, self.sweep.selection, self._folds)

    def sureness(self, number: int) -> Sureness | None:
        """What the repeats say of a trial's recipe, or of the one that it repeats; None where there
        are none.
        """
        if not self.sweep.repeats:
            return None
        trials = answered(self._trained)
        every = {recipe.trial: recipe for recipe in self._repeated(trials)}
        own = _by_number(trials)[number].user_attrs.get("repeats", number)
        recipe = every.get(own)
        if recipe is None or not recipe.repeats:
            return None
        return sureness(recipe, list(every.values()), self._plan)

    @property
    def sure(self) -> list[int]:
        """The trials whose recipes are sure to meet the bar."""
        every = self._repeated(answered(self._trained))
        return [recipe.trial for recipe in self._sure(every)]

    def _sure(self, every: Sequence[Repeated]) -> list[Repeated]:
        states = surenesses(every, self._plan)
        return [recipe for recipe in every if states[recipe.trial].state == "sure"]

    def _repeated(self, trials: Sequence[FrozenTrial]) -> list[Repeated]:
        """Every recipe that was trained to its end, and its repeats."""
        repeats: dict[int, list[FrozenTrial]] = defaultdict(list)
        for trial in trials:
            if "repeats" in trial.user_attrs:
                repeats[trial.user_attrs["repeats"]].append(trial)
        return [
            _with(repeats[trial.number], trial, first)
            for trial in trials
            if "repeats" not in trial.user_attrs and trial.values and (first := _measured(trial))
        ]

    def _to_repeat(self) -> int | None:
        """The number of the trial that is repeated next, or nothing: what may be the answer until
        it is sure; at last both controls, for what the teacher gives.
        """
        trials = self._trained()
        left = self.sweep.study.trials - self._begun()
        if not self.sweep.repeats or left <= 0:
            return None
        every = self._repeated(trials)
        controls = self._controls_to_repeat(every)
        number = next_repeat(every, self._plan, left - len(controls))
        if number is not None and (left > len(controls) or not self._sure(every)):
            return number
        due = left <= len(controls) or self._untrained() >= IN_VAIN
        return controls[0] if controls and due else None

    def _controls_to_repeat(self, every: Sequence[Repeated]) -> list[int]:
        """The controls, as often as they lack a repeat to be compared by."""
        known = {recipe.trial: recipe for recipe in every}
        if not all(number in known for number in range(CONTROLS)):
            return []
        wanted = min(self._plan.most, self.sweep.study.trials // COMPARED)
        lack = [
            wanted - len(known[number].repeats) - known[number].under_way
            for number in range(CONTROLS)
        ]
        return [
            number for at in range(max(lack)) for number in range(CONTROLS) if at < lack[number]
        ]

    def _enqueue_repeat(self, number: int) -> None:
        """Let the trial that is asked for next train another one's recipe again. Number and seed of
        a repeat follow from the study alone: all recipes are compared on the same.
        """
        trials = self._trials()
        first = _by_number(trials)[number]
        repeat = 1 + sum(trial.user_attrs.get("repeats") == number for trial in trials)
        fresh = fresh_values(self.sweep, repeat, self._folds)
        overrides = {**first.user_attrs.get("overrides", {}), **fresh}
        self._study.enqueue_trial(
            first.params, user_attrs={"repeats": number, "repeat": repeat, "overrides": overrides}
        )

    def _is_repeated(self, trial: optuna.Trial) -> bool:
        """Whether another command has asked for this repeat at the same moment, and was first."""
        own = [trial.user_attrs.get(name) for name in ("repeats", "repeat")]
        return own[0] is not None and any(
            [other.user_attrs.get(name) for name in ("repeats", "repeat")] == own
            for other in self._trials()
            if other.number < trial.number
        )

    @property
    def _waits(self) -> bool:
        """Whether a trial has been chosen that nobody has asked for."""
        return any(trial.state == TrialState.WAITING for trial in self._trials())

    def skip(self, trial: Trial, why: str) -> None:
        """A trial is not trained. No sampler learns from it: told that it is bad, TPE found larger
        students in the end.
        """
        answered(lambda: trial._trial.set_user_attr("skipped", why))
        self._tell(trial.number, None, TrialState.FAIL)

    def give_up(self, trial: Trial, why: str) -> None:
        """A trial broke too often."""
        answered(lambda: trial._trial.set_user_attr("given_up", why))
        self._tell(trial.number, None, TrialState.FAIL)

    @property
    def under_way(self) -> bool:
        """Whether any trial has begun and not ended, whoever is at it."""
        return any(trial.state == TrialState.RUNNING for trial in answered(self._trials))

    def hand_back(self, trial: Trial, how: HandedBack) -> None:
        """Leave a trial, if it is still this process's, to whoever looks for one next."""
        if claimed := self._claims.pop(trial.number, None):
            with suppress(*AWAY):  # then it is found without its claimant
                claimed.claimant.hand_back(claimed.held, how)

    def tell(self, number: int, ended: Outcome) -> None:
        """A trial has ended: Optuna is told what is known of it, so that its sampler learns from
        every one.

        A Gaussian process reads COMPLETE trials alone. Told that nothing came of those that were
        ended, it proposes the same point for ever. So one that was ended early is told with what it
        had reached, which is below the bar where `early_stop` ended it; one that diverged as the
        worst; and, where size is minimised, one that has met the bar as what it is, however it
        ended: the selector takes it too. The attribute 'ended' says that it was not whole.
        """
        rule = self._rule
        size = size_of(ended.size, rule.size)
        accuracy = ended.val_accuracy
        limits = constraints(self._aim, size, accuracy, rule, ended.val_samples)
        met = bool(limits) and max(limits.values()) <= 0
        trials = answered(self._trained) if self.sweep.repeats else []
        own = _by_number(trials).get(number)
        if ended.state == "complete" or (met and not (own and "repeats" in own.user_attrs)):
            told, measured = values(self._aim, size, accuracy), None
            if own:
                measured = self._measure(own, ended)
                limits = self._pooled(own, trials, measured, size, limits)
            self._tell(number, told, TrialState.COMPLETE, limits, ended, measured)
        elif ended.state == "diverged":
            told = worst(
                self._aim,
                size,
                [trial.values for trial in answered(self._trained) if trial.values],
            )
            limits = constraints(self._aim, size, 0.0, rule, ended.val_samples)
            self._tell(number, told, TrialState.COMPLETE, limits, ended)
        elif self.sweep.study.early_stop and self.dominated(ended.size):
            # Ended because one no larger has met the bar meanwhile: that says nothing against it.
            self._tell(number, None, TrialState.PRUNED, {}, ended)
        elif self.sweep.study.pruner != "none" and self.sweep.study.sampler != "gp":
            # Others read PRUNED trials by what they had reported, and pruners leave them out of
            # what they compare with.
            self._tell(number, None, TrialState.PRUNED, limits, ended)
        else:
            self._tell(
                number, values(self._aim, size, accuracy), TrialState.COMPLETE, limits, ended
            )

    def _measure(self, trial: FrozenTrial, ended: Outcome) -> Measure:
        recipe = self._recipe(trial)
        assert recipe is not None
        correct = round(ended.val_accuracy * ended.val_samples)
        return Measure(correct, ended.val_samples, recipe.data.fold)

    def _pooled(
        self,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        measured: Measure,
        size: int,
        limits: Mapping[str, float],
    ) -> dict[str, float]:
        """What a sampler is told of a recipe's accuracy: the mean over its repeats; that it meets
        the bar once it is sure.
        """
        own = trial.user_attrs.get("repeats")
        every = {recipe.trial: recipe for recipe in self._repeated(trials)}
        if own not in every:
            return unsure(limits)
        with_it = replace(every[own], repeats=(*every[own].repeats, measured))
        found = sureness(with_it, list((every | {own: with_it}).values()), self._plan)
        pooled = constraints(self._aim, size, found.mean, self._rule, measured.samples)
        return pooled if found.state == "sure" else unsure(pooled)

    def owns(self, trial: Trial) -> bool:
        """Whether a trial is still this process's: one that was cut off from the storage for long
        may have lost it.
        """
        claimed = self._claims.get(trial.number)
        return claimed is not None and answered(lambda: claimed.claimant.owns(claimed.held))

    def _tell(
        self,
        number: int,
        told: Sequence[float] | None,
        state: TrialState,
        limits: Mapping[str, float] | None = None,
        ended: Outcome | None = None,
        measured: Measure | None = None,
    ) -> None:
        claimed = self._claims.get(number)
        if claimed is None:
            raise ClaimLost(f"Trial {number} is not this process's")

        def tell() -> None:
            with claimed.claimant.fenced(claimed.held):
                frozen = self._study.get_trials(deepcopy=False)[number]
                if not frozen.state.is_finished():  # or told just before it went away
                    self._note(frozen, limits or {}, ended, measured)
                    self._study.tell(number, told, state=state)

        answered(tell)
        claimed.claimant.settled(claimed.held)
        del self._claims[number]

    def _note(
        self,
        frozen: FrozenTrial,
        limits: Mapping[str, float],
        ended: Outcome | None,
        measured: Measure | None,
    ) -> None:
        """What a trial's values do not say, while it can still be written."""
        if ended is None:
            return
        # a Trial asks its sampler for values as it is made
        self._study.sampler = optuna.samplers.RandomSampler()
        trial = optuna.Trial(self._study, frozen._trial_id)
        for name in limits:
            if name not in frozen.constraints:
                trial.set_constraint(name, limits[name])
        if ended.state != "complete":
            trial.set_user_attr("ended", ended.state)
        if measured:
            trial.set_user_attr("measured", asdict(measured))
        # nothing of kdexp's reads these: any Optuna tool shows them
        trial.set_user_attr("val_accuracy", ended.val_accuracy)
        trial.set_user_attr("parameters", ended.size.parameters)

    def others(self, claimant: Claimant, patient: bool = True) -> int:
        """How many trials other, living claimants have under way."""
        found = (
            answered(lambda: self._under_way(claimant)) if patient else self._under_way(claimant)
        )
        return sum(
            standing.state != "free"
            for trial, standing in found
            if trial.number not in self._claims
        )

    def bind(self, facts: Mapping[str, str]) -> None:
        """All trials of a study share data and teacher: remember their hashes, or compare. Raises
        StudyError.
        """
        known = self._study.user_attrs
        check_facts(self.sweep, known, facts)
        for name, value in facts.items():
            if name not in known:
                self._study.set_user_attr(name, value)

    def told(self) -> dict[int, Told]:
        """What Optuna was told of each trial that has ended with values, by number."""
        ended = [trial for trial in answered(self._trained) if trial.state == TrialState.COMPLETE]
        curves = {
            trial.number: (trial.user_attrs.get("outcome") or {}).get("curve") for trial in ended
        }
        return {
            t.number: Told(
                tuple(t.values),
                dict(t.constraints),
                self._recipe(t),
                curves[t.number],
                _measured(t),
                t.user_attrs.get("repeats"),
            )
            for t in ended
        }

    def _chosen(self, trial: optuna.Trial, former: FrozenTrial | None, left: str | None) -> Trial:
        """A claimed trial; `former` is what is known of it where somebody else had begun it, `left`
        how that ended.
        """
        chosen, untrained = {}, self._untrained(trial.number)
        # each from a sampler of its own: an ask may have been cut short between two values
        for path in self.sweep.search:
            self._study.sampler = _sampler(self.sweep, trial.number, untrained, path)
            chosen[path] = suggest(trial, self.sweep, path)
        return Trial(
            number=trial.number,
            recipe=self.sweep.recipe.replace(chosen | trial.user_attrs.get("overrides", {})),
            control=trial.user_attrs.get("control", ""),
            retried=former is not None,
            begun=former is not None and "run_id" in former.user_attrs,
            broken=left not in (None, "released"),
            repeats=trial.user_attrs.get("repeats"),
            repeat=trial.user_attrs.get("repeat", 0),
            _aim=self._aim,
            _prunes=self.sweep.study.pruner != "none",
            _trial=trial,
            _reported=frozenset(former.intermediate_values if former else ()),
        )

    def _recipe(self, frozen: FrozenTrial) -> Recipe | None:
        """Of a trial that has been asked for; None while another worker is at it."""
        if frozen.params.keys() != self.sweep.search.keys():
            return None
        if frozen.number not in self._recipes:
            chosen = {
                path: recipe_value(self.sweep, path, stored)
                for path, stored in frozen.params.items()
            }
            self._recipes[frozen.number] = self.sweep.recipe.replace(
                chosen | frozen.user_attrs.get("overrides", {})
            )
        return self._recipes[frozen.number]

    def _trials(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if "over_budget" not in trial.user_attrs]

    def _trained(self) -> list[FrozenTrial]:
        """Without the proposals that were not worth it."""
        return [trial for trial in self._trials() if "skipped" not in trial.user_attrs]

    def _begun(self, before: int | None = None) -> int:
        """How many trials (of a lower number) have begun."""
        begun = (trial for trial in self._trained() if trial.state != TrialState.WAITING)
        return sum(before is None or trial.number < before for trial in begun)

    def _untrained(self, before: int | None = None) -> int:
        """How many proposals in a row, the last ones (before this number), were not worth
        training.
        """
        trials = [trial for trial in self._trials() if before is None or trial.number < before]
        # Skip proposals that another command is still deciding about.
        earlier = (
            trial
            for trial in reversed(trials)
            if trial.state.is_finished() or "run_id" in trial.user_attrs
        )
        return sum(
            1 for _ in itertools.takewhile(lambda trial: "skipped" in trial.user_attrs, earlier)
        )

    def _next_number(self) -> int:
        """The number of the trial that will be asked for: a control that waits, or a new one."""
        trials = self._study.get_trials(deepcopy=False)
        return next(
            (trial.number for trial in trials if trial.state == TrialState.WAITING), len(trials)
        )


def check_study(sweep: Sweep, settings: Settings) -> Begun | None:
    """Before any work: that there is something to search, and that a study of this name is this
    one. Raises StudyError.

    Returns what is known of the study, if it has been set up.
    """
    check_search(sweep)
    quiet()
    settings.stores.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.stores / ".optuna.lock"):
        storage = open_storage(settings)
        if settings.storage is None:
            write_ahead(settings.stores / "optuna.db")
    try:
        study = optuna.load_study(storage=storage, study_name=stored_name(storage, sweep.name))
        if "sweep" in study.user_attrs:
            sweep = _as_it_began(study, sweep)
            _check_same(study, sweep)
            done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
            return Begun(str(study.user_attrs["mlflow_run_id"]), done, study.user_attrs, sweep)
    except KeyError:  # there is none yet
        pass
    finally:
        storage.engine.dispose()  # its connections: a server has few
    return None


def check_search(sweep: Sweep) -> None:
    """That there is something to search. Raises StudyError."""
    if not sweep.search:
        raise StudyError(
            f"search of '{sweep.name}' is empty: there is nothing to search over. Add a range or"
            " choices, for example distillation.alpha: {low: 0.0, high: 1.0}; or use kdexp train"
            " for a single run."
        )


def proposal_seconds(sweep: Sweep, told: int) -> float:
    """What a proposal takes here where so many trials have been told: measured, on a study in
    memory whose trials are made up.
    """
    quiet()
    aim, rule = sweep.study.objective, of_one(sweep)
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(), directions=DIRECTIONS[aim]
    )
    study.sampler = optuna.samplers.RandomSampler(seed=sweep.study.seed)
    for number in range(told):
        trial = study.ask()
        for path in sweep.search:
            suggest(trial, sweep, path)
        size, accuracy = 1000 + 37 * number % 1000, 0.5 + 0.4 * number / told
        for name, value in constraints(aim, size, accuracy, rule, 1000).items():
            trial.set_constraint(name, value)
        study.tell(trial, values(aim, size, accuracy))
    started = time.perf_counter()
    study.sampler = _sampler(sweep, told, 0)
    trial = study.ask()
    for path in sweep.search:
        study.sampler = _sampler(sweep, told, 0, path)
        suggest(trial, sweep, path)
    return time.perf_counter() - started


def quiet() -> None:
    """What Optuna says of itself is not for people here."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # the latter: 'greenlet' would make proposals faster
    for talkative in ("alembic", "optuna._gp.batched_lbfgsb"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def check_facts(sweep: Sweep, known: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """That data or teacher are those which a study has on record, if it has. Raises StudyError."""
    for name, value in facts.items():
        if known.get(name, value) != value:
            raise StudyError(
                f"Study '{sweep.name}' has trials with another {name} (SHA-256 {known[name][:12]}…,"
                f" here {value[:12]}…): they would not compare. Put the former {name} back, or"
                f" rename the sweep (--set name={sweep.name}-2)."
            )


def open_study(
    sweep: Sweep,
    settings: Settings,
    new_parent_run: Callable[[str], str],
    gone: str = "",
    folds: int = 1,
) -> OpenStudy:
    """The study of a sweep, made or found; `new_parent_run` makes its MLflow run, and another for
    one that is `gone`.

    It is given a mark of the study's own, by which a run that was made and then not told to Optuna
    is found again. Raises StudyError.
    """
    # on one machine, one at a time makes stores and studies
    with FileLock(settings.stores / ".optuna.lock"):
        storage = open_storage(settings)
        name = stored_name(storage, sweep.name)
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=DIRECTIONS[sweep.study.objective]
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
            if settings.storage:  # on one machine the lock says that nobody is at it
                _wait_for_set_up(study)
        study.pruner = _pruner(sweep)
        if "sweep" not in study.user_attrs:
            _check_directions(study, sweep)
            if "mlflow_run_id" not in study.user_attrs:
                study.set_user_attr("mlflow_run_id", new_parent_run(_mark(study)))
            study.set_metric_names(_names(sweep))
            _enqueue_controls(study, sweep)
            if sweep.study.sampler == "grid":
                _enqueue_grid(study, sweep)
            study.set_user_attr("sweep", sweep.model_dump_json())  # last: from now on it is set up
        elif gone and study.user_attrs["mlflow_run_id"] == gone:
            study.set_user_attr("mlflow_run_id", new_parent_run(_mark(study)))
    _check_same(study, sweep)
    return OpenStudy(study, sweep, folds)


@contextmanager
def study_there(
    sweep: Sweep, parent_run: str, settings: Settings, folds: int = 1
) -> Iterator[OpenStudy]:
    """A study that has begun, by its MLflow run. Makes no storage. Raises StudyError."""
    unknown = StudyError(
        f"Optuna's storage {without_credentials(settings.storage_url.partition('?')[0])} does not"
        f" know study '{sweep.name}' of run {parent_run}: name the one that its sweep has"
        " (--storage, --stores)."
    )
    if settings.storage is None and not (settings.stores / "optuna.db").exists():
        raise unknown
    quiet()
    storage = open_storage(settings)
    try:
        try:
            study = optuna.load_study(storage=storage, study_name=stored_name(storage, sweep.name))
            known = answered(lambda: study.user_attrs)
        except KeyError:
            raise unknown from None
        if known.get("mlflow_run_id") != parent_run:
            raise unknown
        yield OpenStudy(study, sweep, folds)
    except AWAY as error:
        raise away(error) from error
    finally:
        storage.engine.dispose()  # its connections: a server has few


def _names(sweep: Sweep) -> list[str]:
    """What Optuna's tools write at a trial's values."""
    size, accuracy = str(sweep.selection.size), "val_accuracy"
    names = {"smallest": [size], "accuracy": [accuracy], "pareto": [size, accuracy]}
    return names[sweep.study.objective]


def _mark(study: optuna.Study) -> str:
    """What tells a study from one of the same name in another storage."""
    if "mark" not in study.user_attrs:
        study.set_user_attr("mark", uuid.uuid4().hex)
    return str(study.user_attrs["mark"])


def _curves(trials: Sequence[FrozenTrial]) -> list[list[float]]:
    """The validation accuracies of each epoch of trials that went to their end."""
    known = (trial.user_attrs.get("outcome") for trial in trials if trial.state.is_finished())
    return [outcome["curve"] for outcome in known if outcome]


def _with(repeats: Sequence[FrozenTrial], trial: FrozenTrial, first: Measure) -> Repeated:
    """A recipe with its repeats. What was told as sure stays sure."""
    told = [other.constraints.get("accuracy", 1.0) for other in repeats if other.constraints]
    return Repeated(
        trial.number,
        int(trial.values[0]),
        first,
        tuple(measured for other in repeats if (measured := _measured(other))),
        sum(not other.state.is_finished() for other in repeats),
        any(other.user_attrs.get("ended") == "diverged" for other in repeats),
        min((other.number for other in repeats), default=None),
        "sure" if told and min(told) <= 0 else "open",
    )


def _by_number(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    return {trial.number: trial for trial in trials}


def _measured(trial: FrozenTrial) -> Measure | None:
    """What a trial that has ended was measured to be, where trials are repeated."""
    known = trial.user_attrs.get("measured")
    return Measure(**known) if known and trial.state.is_finished() else None


def _claim_of(trial_id: int) -> str:
    return f"trial {trial_id}"


def _left(frozen: FrozenTrial, standing: Standing) -> str | None:
    """How a trial was left: handed back, or by whom; nothing where nobody had come to claim it."""
    if standing.claim:
        return standing.claim.handed_back or standing.claim.claimant
    return frozen.user_attrs.get("worker")  # as earlier versions had it


def _wait_for_set_up(study: optuna.Study) -> None:
    """Another machine may have made the study a moment ago; if it died over that, this one finishes
    the job.
    """
    deadline = time.monotonic() + SET_UP_SECONDS
    while "sweep" not in study.user_attrs and time.monotonic() < deadline:
        time.sleep(0.2)


def _as_it_began(study: optuna.Study, sweep: Sweep) -> Sweep:
    """A study of an earlier version, which repeated nothing, goes on like that."""
    if "repeats" in json.loads(study.user_attrs["sweep"]).get("study", {}):
        return sweep
    return sweep.model_copy(update={"study": sweep.study.model_copy(update={"repeats": 1})})


def _check_same(study: optuna.Study, sweep: Sweep) -> None:
    """A study can only be continued with the sweep that it began with. Its budget may change, and
    those parts of the selection rule that no trial has been judged by.
    """
    begun = recorded(
        study.user_attrs["sweep"], f"study '{sweep.name}', made by another version of kdexp"
    )
    told = {"smallest": Selection.model_fields.keys(), "accuracy": set[str](), "pareto": {"size"}}[
        begun.study.objective
    ]
    if begun.study.early_stop:  # trials were ended by the bar
        told = told | {"accuracy_bar", "confidence"}
    rule = sweep.selection.model_copy(update={key: getattr(begun.selection, key) for key in told})
    budget = {"trials": sweep.study.trials, "retries": sweep.study.retries}
    if begun.repeats and sweep.repeats:
        budget["repeats"] = sweep.study.repeats
    free = {"study": begun.study.model_copy(update=budget), "selection": rule}
    changed = differences(begun.model_copy(update=free), sweep)
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        select = (
            "; to select by another rule, kdexp select"
            if changed[0].startswith("selection.")
            else ""
        )
        raise StudyError(
            f"Study '{sweep.name}' exists with another content: {changed[0]}{more}. Trials would"
            f" not compare: give the sweep another name (--set name={sweep.name}-2), or set it"
            f" back{select}."
        )


def _check_directions(study: optuna.Study, sweep: Sweep) -> None:
    """One whose making was interrupted holds nothing but its directions."""
    if (
        tuple(direction.name.lower() for direction in study.directions)
        != DIRECTIONS[sweep.study.objective]
    ):
        raise StudyError(
            f"Study '{sweep.name}' was begun with another study.objective than"
            f" {sweep.study.objective}, and interrupted: set it back, or give the sweep another"
            f" name (--set name={sweep.name}-2)."
        )


def _enqueue_controls(study: optuna.Study, sweep: Sweep) -> None:
    """Trials 0 and 1, each once, also where another process died in the middle of this."""
    own = {path: stored_value(sweep, path, sweep.recipe.value(path)) for path in sweep.search}
    path, labels_only = "distillation.alpha", dict(own)
    if path in sweep.search:
        # Where the search space has no alpha = 0, Optuna is told the nearest there is; what is
        # trained is 0.
        labels_only[path] = stored_value(sweep, path, min(sweep.search[path].ends(), key=abs))
    there = {trial.user_attrs.get("control") for trial in study.get_trials(deepcopy=False)}
    for control, start, overrides in (
        ("documented defaults", own, {}),
        ("labels only", labels_only, {path: 0.0}),
    ):
        if control not in there:
            study.enqueue_trial(start, user_attrs={"control": control, "overrides": overrides})


def _enqueue_grid(study: optuna.Study, sweep: Sweep) -> None:
    """Every other point of the grid once, also where another process died in the middle of this."""
    there = len(study.get_trials(deepcopy=False)) - CONTROLS
    for point in sweep.beyond_controls[there:]:
        study.enqueue_trial(
            {path: stored_value(sweep, path, value) for path, value in point.items()}
        )


def _heard(epoch: int, epochs: int) -> bool:
    """Whether Optuna hears of this epoch: 1, 2, 3, 4, 6, 8, 11, 16, 23, … (powers of √2), and the
    last.

    A report and its verdict take 10 ms. The rungs of pruners are geometric too, and early epochs
    tell the most.
    """
    return epoch == epochs or epoch == round(2 ** (round(2 * math.log2(epoch)) / 2))


def _sampler(
    sweep: Sweep, number: int, untrained: int, path: str = ""
) -> optuna.samplers.BaseSampler:
    """A sampler seeded by study, trial and value: proposals do not depend on when a study was
    interrupted.

    After so many proposals in a row that were not worth training, a sampler that chooses would
    choose the like again.
    """
    seed = seed_of(sweep.study.seed, f"sampler {path}", number) % 2**32
    # of a grid every trial is enqueued
    if sweep.study.sampler in ("random", "grid") or untrained >= STUBBORN:
        return optuna.samplers.RandomSampler(seed=seed)
    if sweep.study.sampler == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False
        )
    # liar: other workers' trials count as bad
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    return {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    }[sweep.study.pruner]()
