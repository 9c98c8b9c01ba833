"""When a trial need not be trained to its end, because it cannot be the one that is selected. Pure.

*Beaten*: a smaller student already meets the bar. The selector takes the smallest, so nothing is lost, ever; in bytes none
is, as rounding its weights may make a larger student the smaller one.
*Hopeless*: the trials that went to their end show how much validation accuracy is gained from this epoch on. Were
this one to gain more than any of them, in points and in share of the error, it would still miss the bar by more
than two standard errors. Curves that cross below the bar do no harm: nothing is ranked, only the bar counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdexp.config import Selection
from kdexp.selection import clears

__all__ = ["Outcome", "beaten", "hopeless"]

CURVES = 4  # finished trials before any is judged by them
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Outcome:
    """What a trial that went to its end came to: size in the rule's unit, validation accuracy of each epoch."""

    trial: int
    size: int
    curve: tuple[float, ...]


def beaten(size: int, rule: Selection, outcomes: Sequence[Outcome], samples: int) -> Outcome | None:
    """The smaller student that meets the bar already, if there is one; or none where the goal is accuracy or size in bytes."""
    final = rule.goal == "smallest" and rule.size != "bytes"
    passing = [other for other in outcomes if other.size < size and clears(max(other.curve), samples, rule)]
    return min(passing, key=lambda other: other.size, default=None) if final else None


def hopeless(curve: Sequence[float], rule: Selection, outcomes: Sequence[Outcome], epochs: int, samples: int) -> bool:
    """Whether validation accuracies so far leave the bar out of reach; `samples` is the size of the validation set."""
    now, best = len(curve), max(curve)
    ends = [(max(other.curve[:now]), max(other.curve)) for other in outcomes if len(other.curve) == epochs]
    if len(ends) < CURVES or now >= epochs:
        return False
    points = best + max(end - then for then, end in ends)
    error = (1 - best) * min((1 - end) / max(1 - then, 1e-9) for then, end in ends)
    bar = rule.accuracy_bar
    margin = STANDARD_ERRORS * math.sqrt(bar * (1 - bar) / samples)
    return not clears(min(max(points, 1 - error) + margin, 1.0), samples, rule)
