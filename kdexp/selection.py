"""The selection rule: the smallest trial that meets the accuracy bar, or the most accurate within a
size limit.

And the verdict on a recipe that was trained again with fresh seeds. Pure: no store, no network, no
test split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression, stdev
from typing import Final, Protocol

from kdexp import KdexpError
from kdexp.config import Selection, Size, Study, Sweep, Variant
from kdexp.intervals import mean_low, wilson_low
from kdexp.repeats import Measure, Plan, Repeated, Verdict, verdict, verdicts

__all__ = [
    "AS_TRAINED",
    "Candidate",
    "FreshSeeds",
    "NothingPasses",
    "check_bar",
    "check_reachable",
    "clears",
    "confirms",
    "judged",
    "of_one",
    "passes",
    "plan_of",
    "rank",
    "requirement",
    "said",
    "select",
    "size_of",
    "standing",
]

AS_TRAINED: Final = "as trained"
LEVEL = 0.95  # of a study's answer as a whole, where the rule names none


class NothingPasses(KdexpError):
    """No candidate meets the rule; the message holds the nearest miss and what to change."""


class Sized(Protocol):
    """Whatever has all sizes."""

    @property
    def parameters(self) -> int: ...
    @property
    def multiply_adds(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def activation_bytes(self) -> int | None: ...


@dataclass(frozen=True)
class Candidate:
    """A trained student as the selector sees it. `val_accuracy` is 0 to 1, on validation."""

    run_id: str
    trial: int
    parameters: int
    multiply_adds: int
    bytes: int
    val_accuracy: float
    val_samples: int | None = None
    """How many images that was measured on; None where the run does not say (recorded by a former
    version).
    """
    variant: Variant = AS_TRAINED
    """Or in which precision it is stored, once folded: see variants.py."""
    repeated: Repeated | None = None
    """What its recipe came to with other seeds on other folds, where a study repeats."""
    verdict: Verdict | None = None
    """What its repeats say by the rule in question; None where nothing is repeated."""
    activation_bytes: int | None = None
    """None where a former version recorded the run."""


@dataclass(frozen=True)
class FreshSeeds:
    """What a recipe came to with seeds that no choice has seen: correct predictions of each on the
    same validation images.
    """

    correct: tuple[int, ...]
    samples: int

    @property
    def mean(self) -> float:
        """Validation accuracy over all seeds."""
        return sum(self.correct) / (len(self.correct) * self.samples)

    @property
    def sd(self) -> float:
        """Standard deviation from seed to seed (n - 1)."""
        return stdev(self.accuracies)

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Of each seed."""
        return tuple(correct / self.samples for correct in self.correct)

    def held_against(self, rule: Selection) -> float:
        """What is compared with the bar: the mean, or with `confidence` the lower end of its
        interval.
        """
        return (
            mean_low(self.accuracies, self.samples, rule.confidence)
            if rule.confidence
            else self.mean
        )

    def __str__(self) -> str:
        if len(self.correct) == 1:  # of a study that repeats, one may be enough to be sure
            return f"{100 * self.mean:.2f} % with 1 fresh seed"
        return f"{100 * self.mean:.2f} % ± {100 * self.sd:.2f} over {len(self.correct)} fresh seeds"


def of_one(sweep: Sweep) -> Selection:
    """By which one training is judged: where trials are repeated, their repeats are to be sure, not
    it.
    """
    rule = sweep.selection
    return rule.model_copy(update={"confidence": None}) if sweep.repeats else rule


def plan_of(study: Study, rule: Selection, folds: int) -> Plan:
    """How repeats are judged: by a study's settings and a rule."""
    limit = None if rule.size == "bytes" else rule.limit
    level = rule.confidence or LEVEL
    return Plan(rule.accuracy_bar, level, study.repeats - 1, folds, limit)


def judged(candidates: Sequence[Candidate], plan: Plan, rule: Selection) -> list[Candidate]:
    """The candidates of a study that repeats, each with the verdict on its recipe."""
    every = [
        replace(one.repeated, size=size_of(one, rule.size)) for one in candidates if one.repeated
    ]
    found = verdicts(every, plan)
    return [replace(one, verdict=found.get(one.trial)) for one in candidates]


def select(candidates: Sequence[Candidate], rule: Selection, study: str = "") -> Candidate:
    """The candidate that `rule` picks; ties go to the more accurate (or the smaller), then the
    earlier trial.

    Raises NothingPasses.
    """
    passing = [candidate for candidate in candidates if passes(candidate, rule)]
    if not passing:
        raise NothingPasses(_nearest_miss(candidates, rule, study))
    return min(passing, key=lambda candidate: rank(candidate, rule))


def rank(candidate: Candidate, rule: Selection) -> tuple[float, float, int, str]:
    """What `rule` orders candidates by, best first."""
    size, accuracy = size_of(candidate, rule.size), -candidate.val_accuracy
    first, second = (size, accuracy) if rule.goal == "smallest" else (accuracy, size)
    return first, second, candidate.trial, candidate.variant


def passes(candidate: Candidate, rule: Selection) -> bool:
    """Whether a candidate meets both bar and limit: where its recipe was repeated, once that is
    sure. Raises KdexpError where its record is too old for a confidence.
    """
    if candidate.verdict:
        sure = candidate.verdict.state == "sure" and _within(candidate, rule)
        as_trained = candidate.variant == AS_TRAINED  # rounding may have cost a variant the bar
        return sure and (as_trained or candidate.val_accuracy >= rule.accuracy_bar)
    if rule.confidence and candidate.val_samples is None:
        raise KdexpError(
            f"Trial {candidate.trial} (run {candidate.run_id}) was recorded by a former version of"
            " kdexp, without the number of its validation images: it can only be selected without"
            " confidence (selection.confidence: null)."
        )
    return clears(candidate.val_accuracy, candidate.val_samples or 0, rule) and _within(
        candidate, rule
    )


def clears(val_accuracy: float, val_samples: int, rule: Selection) -> bool:
    """Whether a validation accuracy meets the bar: itself, or with `confidence` the lower end of
    its Wilson interval.
    """
    if rule.confidence is None:
        return val_accuracy >= rule.accuracy_bar
    return wilson_low(val_accuracy, val_samples, rule.confidence) >= rule.accuracy_bar


def check_bar(rule: Selection, val_samples: int) -> None:
    """Whether a student without a single error on so many validation images would meet the bar.
    Raises KdexpError.
    """
    if not clears(1.0, val_samples, rule):
        confidence = rule.confidence or 0.0
        raise KdexpError(
            f"selection.accuracy_bar: at {100 * confidence:g} % confidence no student can meet"
            f" {100 * rule.accuracy_bar:.2f} % on {val_samples:,} validation images: without a"
            " single error the interval's lower end is"
            f" {100 * wilson_low(1.0, val_samples, confidence):.2f} %. Lower the bar or"
            " selection.confidence, or hold out more images (data.validation_fraction)."
        )


def check_reachable(plan: Plan, val_samples: int) -> None:
    """Whether a student without a single error could become sure. Raises KdexpError."""
    perfect = Measure(val_samples, val_samples, 0)
    repeats = tuple(replace(perfect, fold=k % plan.folds) for k in range(1, plan.most + 1))
    low = verdict(one := Repeated(0, 1, perfect, repeats), [one], plan).low
    if low < plan.bar:
        raise KdexpError(
            f"selection.accuracy_bar: no student can be sure at {100 * plan.level:g} % to meet"
            f" {100 * plan.bar:.2f} %: without a single error in {plan.most} repeats of"
            f" {val_samples:,} images the lower end is {100 * low:.2f} %. Lower the bar or"
            " selection.confidence, allow more repeats (study.repeats), or let one training decide"
            " (study.repeats: 1)."
        )


def confirms(seeds: FreshSeeds, rule: Selection) -> bool:
    """Whether fresh seeds confirm that a recipe meets the bar."""
    return seeds.held_against(rule) >= rule.accuracy_bar


def requirement(rule: Selection) -> str:
    """What validation accuracy must be, in a few characters: '≥ 92.40 % at 95 %'."""
    return f"≥ {100 * rule.accuracy_bar:.2f} %" + (
        f" at {100 * rule.confidence:g} %" if rule.confidence else ""
    )


def said(found: Verdict) -> str:
    """What repeats say of a recipe, in a few words: '3 of 9 repeats, 98.40 ± 0.30 %, sure'."""
    spread = "" if found.sd is None else f" ± {100 * found.sd:.2f}"
    return (
        f"{found.repeats} of {found.most} repeats, {100 * found.mean:.2f}{spread} %, "
        + {"sure": "sure", "hopeless": "hopeless", "open": "not sure yet"}[found.state]
    )


def standing(candidate: Candidate, rule: Selection) -> str:
    """How a candidate stands by a rule, in a few words: 'yes', 'no', 'not repeated', or what its
    repeats say.
    """
    found = candidate.verdict
    if found and found.repeats:
        return said(found)
    if found and candidate.val_accuracy >= rule.accuracy_bar:
        return "not repeated"
    return "yes" if passes(candidate, rule) else "no"


def size_of(candidate: Sized, size: Size) -> int:
    """A candidate's size in the unit chosen. Raises KdexpError where its record is too old for
    that.
    """
    found: int | None = getattr(candidate, size)
    if found is None:
        raise KdexpError(
            f"{_which(candidate)} has no {size} on record: a former version of kdexp recorded it,"
            " or its network cannot be looked at step by step. Select by another size (--size);"
            " kdexp benchmark RUN_ID says what it is."
        )
    return found


def _which(candidate: Sized) -> str:
    if isinstance(candidate, Candidate):
        return f"Trial {candidate.trial} (run {candidate.run_id})"
    return "A student"


def _within(candidate: Candidate, rule: Selection) -> bool:
    return rule.limit is None or size_of(candidate, rule.size) <= rule.limit


def _nearest_sure(candidates: Sequence[Candidate], rule: Selection, study: str) -> str:
    """Where repeats decide and none is sure: the nearest, and what it would take."""
    unit, level = rule.size.replace("_", "-"), 100 * (rule.confidence or LEVEL)
    within = [candidate for candidate in candidates if _within(candidate, rule)]
    repeated = [(c, c.verdict) for c in within if c.verdict and c.verdict.repeats]
    of = f" of study '{study}'" if study else ""
    head = f"No student{of} is sure to reach {100 * rule.accuracy_bar:.2f} % at {level:g} %"
    if not repeated:
        once = any(c.val_accuracy >= rule.accuracy_bar for c in within)
        all_the_same = (
            f" One training reached it: kdexp select {study or 'STUDY'} takes that; more trainings"
            " (--trials) repeat it."
        )
        return (
            f"{head}: no trial has repeats.{all_the_same if once else ''} {_larger(within, rule)}"
        )
    nearest, found = max(repeated, key=lambda pair: (pair[1].low, -pair[0].trial))
    head = (
        f"{head}. Nearest: trial {nearest.trial} ({size_of(nearest, rule.size):,} {unit}):"
        f" {said(found)}."
    )
    if found.mean <= rule.accuracy_bar:
        return f"{head} {_larger(within, rule)}"
    more = math.ceil(
        found.repeats * ((found.mean - found.low) / (found.mean - rule.accuracy_bar)) ** 2
    )
    return (
        f"{head} It would take about {more} repeats (study.repeats: {more + 1}; more trainings:"
        f" --trials), or a larger student. {_larger(within, rule)}"
    )


def _larger(candidates: Sequence[Candidate], rule: Selection) -> str:
    """What to change, with the size at which the trend of all trials meets the bar."""
    hint = (
        "Lower the bar (kdexp select --bar), train longer (training.epochs), or add larger students"
        " to 'search'"
    )
    points = [
        (math.log(size_of(c, rule.size)), math.log(1 - c.val_accuracy))
        for c in candidates
        if c.val_accuracy < 1
    ]
    if len({size for size, _ in points}) < 2 or rule.accuracy_bar == 1:
        return f"{hint}."
    slope, level = linear_regression(*zip(*points, strict=True))
    if slope >= 0:
        return f"{hint}."
    size = math.exp((math.log(1 - rule.accuracy_bar) - level) / slope)
    if not 1 <= size < 1e9:
        return f"{hint}."
    near = round(size, 1 - math.floor(math.log10(size)))
    return f"{hint}: by the trend of all trials about {near:,.0f} {rule.size.replace('_', '-')}."


def _nearest_miss(candidates: Sequence[Candidate], rule: Selection, study: str) -> str:
    if any(candidate.verdict for candidate in candidates):
        return _nearest_sure(candidates, rule, study)
    unit = rule.size.replace("_", "-")
    of = f" of study '{study}'" if study else ""
    if not candidates:
        return f"No trial{of} has finished, so there is nothing to select; run its sweep first."
    within = [candidate for candidate in candidates if _within(candidate, rule)]
    limit = f" within {rule.limit:,} {unit}" if rule.limit else ""
    if not within:
        best = min(candidates, key=lambda c: (size_of(c, rule.size), c.trial))
        return (
            f"No student{of} is{limit}. Smallest: {size_of(best, rule.size):,} {unit} (val accuracy"
            f" {best.val_accuracy:.4f}, trial {best.trial}, run {best.run_id}). Raise"
            " selection.limit, or add smaller students to 'search'."
        )
    best = max(within, key=lambda c: (c.val_accuracy, -size_of(c, rule.size), -c.trial))
    sure, low = "", ""
    if rule.confidence and best.val_samples:
        sure = f" at {100 * rule.confidence:g} % confidence"
        low = f", lower end {wilson_low(best.val_accuracy, best.val_samples, rule.confidence):.4f}"
    return (
        f"No student{of} reaches validation accuracy {rule.accuracy_bar:.4g}{sure}{limit}. Best:"
        f" {best.val_accuracy:.4f}{low} ({size_of(best, rule.size):,} {unit}, trial {best.trial},"
        f" run {best.run_id}). Lower the bar (kdexp select --bar), train longer (training.epochs),"
        " or add larger students to 'search'."
    )
