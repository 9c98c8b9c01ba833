"""The selection rule: the smallest trial that meets the accuracy bar, or the most accurate within a size limit.

Pure: no store, no network, no test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kdexp import KdexpError
from kdexp.config import Selection, Size, Variant

__all__ = ["AS_TRAINED", "Candidate", "NothingPasses", "passes", "rank", "select", "size_of"]

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
    variant: Variant = AS_TRAINED
    """Or in which precision it is stored, once folded: see kdexp/variants.py."""


def select(candidates: Sequence[Candidate], rule: Selection, study: str = "") -> Candidate:
    """The candidate that `rule` picks; ties go to the more accurate (or the smaller), then the earlier trial.

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
    """Whether a candidate meets both bar and limit."""
    return candidate.val_accuracy >= rule.accuracy_bar and _within(candidate, rule)


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
            f"No student{of} is{limit}. Smallest: {size_of(best, rule.size):,} {unit} (val accuracy "
            f"{best.val_accuracy:.4f}, trial {best.trial}, run {best.run_id}). Raise selection.limit, or add smaller "
            f"students to 'search'."
        )
    best = max(within, key=lambda c: (c.val_accuracy, -size_of(c, rule.size), -c.trial))
    return (
        f"No student{of} reaches validation accuracy {rule.accuracy_bar:.4g}{limit}. Best: {best.val_accuracy:.4f} "
        f"({size_of(best, rule.size):,} {unit}, trial {best.trial}, run {best.run_id}). Lower the bar "
        f"(kdexp select --bar), train longer (training.epochs), or add larger students to 'search'."
    )
