"""What a study aims at, in the numbers that its sampler is told. Pure.

    smallest    minimise size, where  log(errors / errors that the bar allows) <= 0
                               and    log(size / limit) <= 0, if there is a limit
    accuracy    maximise validation accuracy
    pareto      minimise size, and maximise validation accuracy

Errors count by their ratio because that is how they fall: from 20 % to 10 % is as far as from 2 %
to 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdexp.config import Choices, Objective, Selection
from kdexp.intervals import wilson_low

__all__ = [
    "DIRECTIONS",
    "Passing",
    "compared",
    "constraints",
    "dominated",
    "scale",
    "unsure",
    "values",
    "worst",
]

DIRECTIONS: Mapping[Objective, tuple[Literal["minimize", "maximize"], ...]] = {
    "smallest": ("minimize",),
    "accuracy": ("maximize",),
    "pareto": ("minimize", "maximize"),
}
SLACK = 0.002  # added to every share of errors: none at all has a logarithm too
NOT_SURE = 1e-6  # told of a pass that is not sure: a sampler takes what is met for the one to beat


@dataclass(frozen=True)
class Passing:
    """A trial that meets the rule, and its size in the rule's unit."""

    trial: int
    size: int


def values(aim: Objective, size: int, val_accuracy: float) -> tuple[float, ...]:
    """What is to be minimised or maximised, by DIRECTIONS."""
    return {
        "smallest": (float(size),),
        "accuracy": (val_accuracy,),
        "pareto": (float(size), val_accuracy),
    }[aim]


def worst(aim: Objective, size: int, others: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The values of a training that came to nothing, worse than those that others came to: no
    accuracy at all.

    Its size is its own; but on a frontier the smallest student would stand for ever, so there it is
    no smaller than any.
    """
    largest = max([float(size), *(other[0] for other in others)]) if aim == "pareto" else size
    return values(aim, int(largest), 0.0)


def constraints(
    aim: Objective, size: int, val_accuracy: float, rule: Selection, samples: int
) -> dict[str, float]:
    """By name, each met where it is at most 0. With `confidence` the lower end of the accuracy's
    interval must meet the bar.
    """
    if aim != "smallest":
        return {}
    accuracy = (
        wilson_low(val_accuracy, samples, rule.confidence) if rule.confidence else val_accuracy
    )
    bar = {"accuracy": math.log((1 - accuracy + SLACK) / (1 - rule.accuracy_bar + SLACK))}
    return (
        bar
        if rule.limit is None or rule.size == "bytes"
        else bar | {"size": math.log(size / rule.limit)}
    )


def unsure(limits: Mapping[str, float]) -> dict[str, float]:
    """The constraints of a trial that is not sure to meet the bar: its accuracy's is not met."""
    return {**limits, "accuracy": max(limits["accuracy"], NOT_SURE)}


def compared(aim: Objective, val_accuracy: float) -> float:
    """What a pruner compares: it takes an epoch's value to be better in the direction in which the
    study's is.
    """
    return 1 - val_accuracy if aim == "smallest" else val_accuracy


def dominated(aim: Objective, size: int, rule: Selection, smallest: Passing | None) -> str:
    """Why a student of this size need not be trained, `smallest` being the smallest that passes; or
    nothing.

    In bytes there is no reason: rounding its weights may make a larger student the smaller one.
    """
    if aim != "smallest" or rule.size == "bytes":
        return ""
    if rule.limit is not None and size > rule.limit:
        return f"selection.limit is {rule.limit:,}"
    if smallest and size >= smallest.size:
        return f"trial {smallest.trial} meets the bar with {smallest.size:,}"
    return ""


def scale(aim: Objective, dimension: Choices) -> Sequence[Any] | None:
    """The choices from small to large (numbers; lists by their sum), where they have such an order
    and size is aimed at.

    A sampler then knows which are neighbours, and closes in on a size from both sides.
    """
    if aim == "accuracy" or any(
        isinstance(choice, bool | str | None) for choice in dimension.choices
    ):
        return None
    return sorted(dimension.choices, key=_magnitude)


def _magnitude(choice: Any) -> float:
    return sum(choice) if isinstance(choice, tuple) else choice
