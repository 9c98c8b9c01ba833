"""When a trial under way need not be trained to its end, because it cannot be the one that is
selected. Pure.

*Dominated* (objective.py): where the smallest is searched for, one no larger has met the bar
meanwhile. *Futile*: the trials that went to their end show how much validation accuracy is gained
from this epoch on. Were this one to gain more than any of them, in points and in share of the
error, it would still miss the bar by more than two standard errors. Curves that cross below the bar
do no harm: nothing is ranked, only the bar counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdexp.config import Selection
from kdexp.selection import clears

__all__ = ["futile"]

CURVES = 4  # finished trials before any is judged by them
STANDARD_ERRORS = 2.0


def futile(
    curve: Sequence[float],
    rule: Selection,
    finished: Sequence[Sequence[float]],
    epochs: int,
    samples: int,
) -> bool:
    """Whether the validation accuracies of a trial's epochs so far leave the bar out of reach.

    `finished` are those of the trials that went to their end, `samples` is the size of the
    validation set.
    """
    now, best = len(curve), max(curve)
    ends = [(max(other[:now]), max(other)) for other in finished if len(other) == epochs]
    if len(ends) < CURVES or now >= epochs:
        return False
    points = best + max(end - then for then, end in ends)
    error = (1 - best) * min((1 - end) / max(1 - then, 1e-9) for then, end in ends)
    bar = rule.accuracy_bar
    margin = STANDARD_ERRORS * math.sqrt(bar * (1 - bar) / samples)
    return not clears(min(max(points, 1 - error) + margin, 1.0), samples, rule)
