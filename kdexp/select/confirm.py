"""Is the selected model over the bar, or was it the luckiest of many? Its recipe trained again with
fresh seeds.

    kdexp confirm STUDY

The best of many noisy trials overstates itself; seeds that took part in no choice do not. The first
recipe, in the rule's order, whose fresh seeds meet the bar, none of them diverging, is confirmed;
it alone is looked at on test, each of its models once. Every seed follows from the study's and the
trial: the same command finds what is trained and trains what is not.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import torch

from kdexp.config import Selection
from kdexp.repeats import Verdict as Sureness
from kdexp.repeats import next_repeat
from kdexp.runs import describe
from kdexp.runs.records import FOLDS, recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.search.claims import Claimant
from kdexp.select.fresh import (
    TRAIN_AND_VALIDATION,
    TRAIN_ONLY,
    Retrainer,
    SeedDone,
    SeedEvent,
)
from kdexp.select.promote import (
    candidates,
    load_call,
    look_at_test,
    looks,
    measured,
    register,
    say_where,
    sweep_of,
    tell,
    test_of,
    with_repeats,
)
from kdexp.selection import (
    Candidate,
    FreshSeeds,
    NothingPasses,
    confirms,
    judged,
    plan_of,
    requirement,
    said,
    select,
)
from kdexp.settings import Settings

__all__ = ["Confirmation", "Verdict", "confirm"]

T = TypeVar("T")
UNLIMITED = 10**6  # trainings that may still begin: as many as it takes
TRIED_LATER = 10**9  # after every recipe that the study itself repeated


@dataclass(frozen=True)
class Verdict:
    """What fresh seeds say of a candidate."""

    candidate: Candidate
    seeds: FreshSeeds
    rule: Selection
    diverged: str = ""
    """Which seeds diverged, in which runs; nothing where none did."""
    repeats: Sureness | None = None
    """What they say where a study repeats, each on another fold."""

    @property
    def confirmed(self) -> bool:
        """Whether they confirm it. A recipe that diverges with some seed does not hold, whatever
        its mean.
        """
        if self.repeats:
            return not self.diverged and self.repeats.state == "sure"
        return not self.diverged and confirms(self.seeds, self.rule)

    def __str__(self) -> str:
        if self.repeats:
            return said(self.repeats) + (f"; {self.diverged}" if self.diverged else "")
        low = (
            f", lower end {100 * self.seeds.held_against(self.rule):.2f} %"
            if self.rule.confidence
            else ""
        )
        return f"{self.seeds}{low}" + (f"; {self.diverged}" if self.diverged else "")


@dataclass(frozen=True)
class Confirmation:
    """The confirmed recipe, and the one look at test of each of its models."""

    verdict: Verdict
    tried: tuple[Verdict, ...]
    """Those before it that were not confirmed."""
    runs: tuple[RunRecord, ...]
    """Of the models that were looked at, the registered one first."""
    images: str
    test: FreshSeeds
    tta: FreshSeeds | None
    """The same with flip test-time augmentation; None where the recipe does not flip."""
    looks: int
    """How many models of the study have been looked at on test, here and before."""
    model: str
    """Where MLflow loads the first of the models from; empty where the network cannot be
    exported.
    """


def confirm(
    study: RunRecord,
    rule: Selection,
    seeds: int,
    train_and_validation: bool,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
) -> Generator[SeedEvent | Verdict, None, Confirmation]:
    """Find the first trial, in the order of `rule`, that fresh seeds confirm, and look at it on
    test.

    With `train_and_validation` its models are trained once more, with the same seeds, on all images
    but test's, and these are looked at. Close the generator to stop cleanly. Raises NothingPasses
    where no trial is confirmed.
    """
    say_where(study, settings)
    with Claimant(settings) as claimant:
        work = Retrainer(study, sweep_of(study, tracking), settings, tracking, device, claimant)
        return (yield from _confirm(work, rule, seeds, train_and_validation))


def _confirm(
    work: Retrainer, rule: Selection, seeds: int, train_and_validation: bool
) -> Generator[SeedEvent | Verdict, None, Confirmation]:
    study, tracking = work.study, work.tracking
    left, tried = candidates(study, tracking), list[Verdict]()
    images = TRAIN_AND_VALIDATION if train_and_validation else TRAIN_ONLY
    while True:
        if work.sweep.repeats and rule.goal == "smallest":
            verdict, runs = yield from _until_sure(work, left, rule, seeds)
        else:
            chosen = _next(left, rule, tried, work.sweep.name)
            work.check_trial(tracking.read(chosen.run_id))
            runs = yield from work.train(chosen, seeds, TRAIN_ONLY)
            seen = measured(runs, "val_accuracy", "val_samples")
            verdict = Verdict(chosen, seen, rule, _diverged(runs, TRAIN_ONLY))
        chosen = verdict.candidate
        yield _said(verdict, tracking)
        if verdict.confirmed and train_and_validation:
            runs = yield from work.train(chosen, len(runs), images)
            if broken := _diverged(runs, images):
                yield _said(verdict := replace(verdict, diverged=broken), tracking)
        if verdict.confirmed:
            break
        tried.append(verdict)
        left.remove(chosen)
    done = _look(verdict, tried, runs, images, work)
    _report(done, work)
    return done


def _until_sure(
    work: Retrainer, trials: Sequence[Candidate], rule: Selection, seeds: int
) -> Generator[SeedEvent | Verdict, None, tuple[Verdict, list[RunRecord]]]:
    """Go on where the study's repeats ended, by another rule or with more of them, until the
    smallest that can be sure is. Raises NothingPasses.
    """
    plan = plan_of(work.sweep.study, rule, int(work.study.tags[FOLDS]))
    plan = replace(plan, most=max(plan.most, seeds))
    known = {trial.trial: trial for trial in trials}
    for turn in count(TRIED_LATER):
        every = judged(list(known.values()), plan, rule)
        number = next_repeat([one.repeated for one in every if one.repeated], plan, UNLIMITED)
        if number is None:
            break
        chosen = known[number]
        work.check_trial(work.tracking.read(chosen.run_id))
        begun = chosen.repeated
        assert begun is not None
        runs = yield from _what_is_new(work.train(chosen, len(begun.repeats) + 1, TRAIN_ONLY))
        since = turn if begun.since is None else begun.since
        known[number] = replace(chosen, repeated=with_repeats(begun, runs, since))
    chosen = select(every, rule, work.sweep.name)
    repeats = chosen.verdict.repeats if chosen.verdict else 0
    runs = yield from _what_is_new(work.train(chosen, repeats, TRAIN_ONLY))
    seen = measured(runs, "val_accuracy", "val_samples")
    return Verdict(chosen, seen, rule, _diverged(runs, TRAIN_ONLY), chosen.verdict), runs


def _what_is_new(work: Generator[SeedEvent, None, T]) -> Generator[SeedEvent, None, T]:
    """The events of a training without those that were said before."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return end.value
        if not isinstance(event, SeedDone) or event.new:
            yield event


def _said(verdict: Verdict, tracking: Tracking) -> Verdict:
    """The verdict, once its trial's run says so too."""
    said = "yes" if verdict.confirmed else "no"
    text = f"{said}: {verdict}, required {requirement(verdict.rule)}"
    tracking.tag(verdict.candidate.run_id, {"kdexp.confirmed": text})
    return verdict


def _diverged(runs: Sequence[RunRecord], images: str) -> str:
    """Which of the fresh seeds diverged on these images, or nothing."""
    found = [
        (number, run)
        for number, run in enumerate(runs, start=1)
        if run.tags.get("kdexp.state") == "diverged"
    ]
    on = "" if images == TRAIN_ONLY else f" on {images}"
    return ", ".join(
        f"fresh seed {number} diverged{on} (run {run.run_id})" for number, run in found
    )


def _next(
    left: Sequence[Candidate], rule: Selection, tried: Sequence[Verdict], study: str
) -> Candidate:
    """The next candidate in the rule's order. Raises NothingPasses."""
    try:
        return select(left, rule, study)
    except NothingPasses:
        if not tried:
            raise
    nearest = max(
        tried, key=lambda verdict: (not verdict.diverged, verdict.seeds.held_against(rule))
    )
    raise NothingPasses(
        f"No student of study '{study}' is confirmed: {len(tried)} passed as trained in it, none"
        f" with fresh seeds ({requirement(rule)}). Nearest: {nearest} (trial"
        f" {nearest.candidate.trial}, {nearest.candidate.parameters:,} parameters)."
        f" {_advice(tried)}"
    )


def _advice(tried: Sequence[Verdict]) -> str:
    if all(verdict.diverged for verdict in tried):
        return (
            "Search with lower learning rates (search.training.learning_rate): a recipe that"
            " diverges by chance holds nowhere."
        )
    return (
        "Lower the bar (--bar), train longer (training.epochs), or add larger students to 'search'."
    )


# --- test, once ---


def _look(
    verdict: Verdict,
    tried: Sequence[Verdict],
    runs: Sequence[RunRecord],
    images: str,
    work: Retrainer,
) -> Confirmation:
    """Look at the confirmed recipe's models on test, where that has not been done, and register the
    first.
    """
    tracking, name, trial = work.tracking, work.sweep.name, verdict.candidate.trial
    recipe = recipe_of(runs[0], tracking)
    with work.claimant.lock(test_of(work.study)):
        for number, run in enumerate(runs, start=1):
            if "test_accuracy" not in (known := tracking.read(run.run_id)).metrics:
                work.check(known)
                if number == 1:
                    work.keep_mistakes(known)
                why = (
                    f"**Confirms** trial {trial} of study *{name}*: fresh seed {number} of"
                    f" {len(runs)}."
                )
                look_at_test(known, recipe, why, work.settings, tracking, work.device)
        found = tuple(tracking.read(run.run_id) for run in runs)
        test = measured(found, "test_accuracy", "test_samples")
        text = (
            f"Fresh seed 1 of trial {trial}: validation accuracy {verdict.seeds}; test accuracy"
            f" {test}"
        )
        model = register(found[0], recipe, name, "confirmed", text, work.settings, tracking)
    tta = measured(found, "test_accuracy_tta", "test_samples") if recipe.data.augment.flip else None
    return Confirmation(
        verdict, tuple(tried), found, images, test, tta, looks(work.study, tracking), model
    )


def _report(done: Confirmation, work: Retrainer) -> None:
    """Tags, metrics and description of the study's run."""
    chosen, tracking, study = done.verdict.candidate, work.tracking, work.study
    tta = f", with flip test-time augmentation {done.tta}" if done.tta else ""
    text = describe.confirmed(
        chosen,
        done.verdict.rule,
        str(done.verdict),
        f"**{done.test}**{tta}, trained on {done.images}",
        done.runs[0].run_id,
        load_call(done.model) if done.model else "",
        [
            f"trial {v.candidate.trial} ({v.candidate.parameters:,} parameters): {v}"
            for v in done.tried
        ],
    )
    tell(study, "confirmed", text, tracking)
    tracking.tag(
        study.run_id, {"kdexp.confirmed_run": chosen.run_id, "kdexp.confirmed": str(done.verdict)}
    )
    found = {"confirm_val": done.verdict.seeds, "confirm_test": done.test}
    if done.tta:
        found["confirm_test_tta"] = done.tta
    means = {f"{name}_mean": seeds.mean for name, seeds in found.items()}
    spread = {f"{name}_sd": each.sd for name, each in found.items() if len(each.correct) > 1}
    tracking.log_metrics(study.run_id, means | spread)
