"""The student sizes that a search space holds: its smallest, its largest, how many are within the
limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
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
    searched = {
        path: dimension
        for path, dimension in sweep.search.items()
        if path.startswith("student.") and path not in WITHOUT_SIZE
    }
    axes = [_values(dimension, sweep.recipe.value(path)) for path, dimension in searched.items()]
    whole = not any(_is_endless(axis) for axis in axes) and prod(map(len, axes)) <= MOST
    if not whole:
        axes = [_ends(axis) for axis in axes]
    points = [dict(zip(searched, values, strict=True)) for values in product(*axes)]
    return points[:MOST], whole and len(points) <= MOST


Axis = Sequence[Any]


def _values(dimension: Dimension, current: Any) -> Axis:
    """Every value in order of size, or both ends of a range of fractions."""
    if isinstance(dimension, Choices):
        plain = all(isinstance(choice, int | float | tuple) for choice in dimension.choices)
        return sorted(dimension.choices, key=_magnitude) if plain else dimension.choices
    low, last, step = dimension.low, dimension.last, dimension.step or 1
    if isinstance(low, int) and isinstance(last, int) and isinstance(current, int):
        return range(low, last + 1, int(step))
    return (float(low), float(last))


def _is_endless(axis: Axis) -> bool:
    return isinstance(axis, tuple) and all(isinstance(value, float) for value in axis)


def _ends(axis: Axis) -> Axis:
    """The least and the greatest value, where they have an order."""
    ordered = isinstance(axis, range | list) and len(axis) > 2
    return (axis[0], axis[-1]) if ordered else axis


def _magnitude(choice: Any) -> float:
    return sum(choice) if isinstance(choice, tuple) else choice
