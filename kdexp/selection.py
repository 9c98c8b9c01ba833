"""The selection rule: the smallest trial that meets the accuracy bar, or the most accurate within a
size limit.

And the verdict on a recipe that was trained again with fresh seeds. Pure: no store, no network, no
test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Final, Protocol

from kdexp import KdexpError
from kdexp.config import Selection, Size, Variant
from kdexp.intervals import mean_low, wilson_low

__all__ = [
    "AS_TRAINED",
    "Candidate",
    "FreshSeeds",
    "NothingPasses",
    "check_bar",
    "clears",
    "confirms",
    "passes",
    "rank",
    "requirement",
    "select",
    "size_of",
]

AS_TRAINED: Final = "as trained"


class NothingPasses(KdexpError):
    """No candidate meets the rule; the message holds the nearest miss and what to change."""


class Sized(Protocol):
    """Whatever has all three sizes."""

    @property
    def parameters(self) -> int: ...
    @property
    def multiply_adds(self) -> int: ...
    @property
    def bytes(self) -> int: ...


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
        return f"{100 * self.mean:.2f} % ± {100 * self.sd:.2f} over {len(self.correct)} fresh seeds"


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
    """Whether a candidate meets both bar and limit. Raises KdexpError where its record is too old
    for a confidence.
    """
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


def confirms(seeds: FreshSeeds, rule: Selection) -> bool:
    """Whether fresh seeds confirm that a recipe meets the bar."""
    return seeds.held_against(rule) >= rule.accuracy_bar


def requirement(rule: Selection) -> str:
    """What validation accuracy must be, in a few characters: '≥ 92.40 % at 95 %'."""
    return f"≥ {100 * rule.accuracy_bar:.2f} %" + (
        f" at {100 * rule.confidence:g} %" if rule.confidence else ""
    )


def size_of(candidate: Sized, size: Size) -> int:
    """A candidate's size in the unit chosen."""
    return int(getattr(candidate, size))


def _within(candidate: Candidate, rule: Selection) -> bool:
    return rule.limit is None or size_of(candidate, rule.size) <= rule.limit


def _nearest_miss(candidates: Sequence[Candidate], rule: Selection, study: str) -> str:
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
