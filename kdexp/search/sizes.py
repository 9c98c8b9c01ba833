"""The student sizes that a search space holds: its smallest, its largest, how many are within the
limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from kdexp.config import Choices, ConfigError, Dimension, Recipe, Sweep
from kdexp.distill.datasets import Split
from kdexp.distill.models import ModelError, Size, measure, outline
from kdexp.selection import size_of

__all__ = ["Sized", "Sizes", "sizes_of"]

MOST = 200  # students looked at: one takes some 20 ms
WITHOUT_SIZE = ("student.dropout",)


@dataclass(frozen=True)
class Sized:
    """A student, by a recipe that trains it."""

    recipe: Recipe
    size: Size


@dataclass(frozen=True)
class Sizes:
    """What a search space holds."""

    smallest: Sized
    largest: Sized
    students: int
    """That were looked at and can be built ..."""
    within: int
    """... and of these, within `selection.limit`; all where there is none."""
    unbuildable: int
    whole: bool
    """Whether these are all; else both ends of each range, and choices, stand for all."""


def sizes_of(sweep: Sweep, like: Split) -> Sizes:
    """Every student of the search that differs in more than dropout. Raises ModelError where none
    can be built.
    """
    points, whole = _points(sweep)
    found, why = list[Sized](), "nothing to build"
    for point in points:
        try:
            recipe = sweep.recipe.replace(point)
            found.append(Sized(recipe, measure(outline(recipe.student, like), like)))
        except (ModelError, ConfigError) as error:
            why = str(error)
    if not found:
        raise ModelError(why)
    unit, limit = sweep.selection.size, sweep.selection.limit
    found.sort(key=lambda one: (size_of(one.size, unit), one.size.parameters))
    within = sum(limit is None or size_of(one.size, unit) <= limit for one in found)
    return Sizes(found[0], found[-1], len(found), within, len(points) - len(found), whole)


def _points(sweep: Sweep) -> tuple[list[dict[str, Any]], bool]:
    """The students by what is searched of them, and whether these are all."""
    axes = {
        path: dimension
        for path, dimension in sweep.search.items()
        if path.startswith("student.") and path not in WITHOUT_SIZE
    }
    every = [_values(axes[path], sweep.recipe.value(path)) for path in axes]
    whole = all(values is not None for values in every)
    lists = [values or axis.ends() for values, axis in zip(every, axes.values(), strict=True)]
    if _product(lists) > MOST:
        whole = False
        lists = [
            [axis.ends()[0], axis.ends()[-1]] if len(a) > 2 and not isinstance(axis, Choices) else a
            for a, axis in zip(lists, axes.values(), strict=True)
        ]
    points = [dict(zip(axes, values, strict=True)) for values in product(*lists)]
    step = -(-len(points) // MOST)
    own = [{}] if step > 1 else []
    return [*own, *points[::step], *([points[-1]] if step > 1 else [])], whole and step == 1


def _product(lists: Sequence[Sequence[Any]]) -> int:
    count = 1
    for each in lists:
        count *= len(each)
    return count


def _values(dimension: Dimension, current: Any) -> Sequence[Any] | None:
    """Every value, or None where there is no end of them."""
    if isinstance(dimension, Choices):
        return dimension.choices
    low, last, step = dimension.low, dimension.last, dimension.step
    whole = all(isinstance(value, int) for value in (low, last, current))
    if not whole or not isinstance(low, int) or not isinstance(last, int):
        return None
    return range(low, last + 1, int(step or 1))
