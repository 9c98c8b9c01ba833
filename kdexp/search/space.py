"""The searched space: a value as Optuna stores it and as the recipe has it, and which recipes
train the same or nearly the same. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdexp.config import (
    Choices,
    Dimension,
    Range,
    Recipe,
    Sweep,
    as_meant,
)
from kdexp.distill.randomness import seed_of
from kdexp.search.objective import scale

__all__ = [
    "NEAR",
    "fresh_values",
    "learns_alike",
    "nearly_alike",
    "recipe_value",
    "stored_value",
    "suggest",
]

NEAR = 0.01  # share of a searched range: numbers that lie closer together train nearly the same


def learns_alike(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train the same: with labels only it does not matter how they would
    distil.
    """
    if one.distillation.alpha == 0 == other.distillation.alpha:
        other = other.model_copy(update={"distillation": one.distillation})
    if one == other or one.distillation.scale_by_t_squared == other.distillation.scale_by_t_squared:
        return one == other
    return as_meant(one) == as_meant(other)


def nearly_alike(one: Recipe, other: Recipe, search: Mapping[str, Dimension]) -> bool:
    """Whether two recipes of one search train nearly the same: numbers lie within NEAR of their
    ranges, all else is equal.
    """
    labels_only = one.distillation.alpha == 0 == other.distillation.alpha
    # which a control sets whether it is searched or not
    paths = dict.fromkeys([*search, "distillation.alpha"])
    deciding = [path for path in paths if not (labels_only and path.startswith("distillation."))]
    return all(
        _close(search.get(path), path, _leaf(one, path), _leaf(other, path)) for path in deciding
    )


def _close(dimension: Dimension | None, path: str, one: Any, other: Any) -> bool:
    # the next seed is another training altogether
    if isinstance(dimension, Range) and path != "training.seed":
        return dimension.apart(one, other) < NEAR
    return bool(one == other)


def _leaf(recipe: Recipe, path: str) -> Any:
    """The value at a dotted path, as the recipe holds it."""
    node: Any = recipe
    for step in path.split("."):
        node = node[step] if isinstance(node, Mapping) else getattr(node, step)
    return tuple(node) if isinstance(node, list) else node


def fresh_values(sweep: Sweep, repeat: int, folds: int) -> dict[str, Any]:
    """What the so-many-th repeat of a recipe (from 1) has of its own, whichever recipe it is: all
    are compared by the same seeds on the same folds. Each keeps its last epoch: the best one would
    be picked on the very images that judge it.
    """
    return {
        "training.seed": seed_of(sweep.study.seed, "repeat", repeat),
        "training.keep": "last",
        "data.fold": (sweep.data.fold + repeat) % folds,
    }


# --- reading -----------------------------------------------------------------------------------


def stored_value(sweep: Sweep, path: str, value: Any) -> Any:
    """A value as Optuna stores it: a choice as its place on a scale, or as JSON, because a list is
    no category to Optuna.
    """
    dimension = sweep.search[path]
    if not isinstance(dimension, Choices):
        return value
    plain = tuple(value) if isinstance(value, list) else value
    ordered = scale(sweep.study.objective, dimension)
    # 5 where the recipe says 5.0
    return (
        ordered.index(plain)
        if ordered
        else json.dumps(next(choice for choice in dimension.choices if choice == plain))
    )


def recipe_value(sweep: Sweep, path: str, stored: Any) -> Any:
    """What Optuna stores, as the recipe has it."""
    dimension = sweep.search[path]
    if not isinstance(dimension, Choices):
        return stored
    ordered = scale(sweep.study.objective, dimension)
    return ordered[stored] if ordered else json.loads(stored)


def suggest(trial: Any, sweep: Sweep, path: str) -> Any:
    """A value of one path, as `trial`, one of Optuna's, proposes it."""
    dimension = sweep.search[path]
    if isinstance(dimension, Choices):
        if ordered := scale(sweep.study.objective, dimension):
            return recipe_value(sweep, path, trial.suggest_int(path, 0, len(ordered) - 1))
        stored = [stored_value(sweep, path, choice) for choice in dimension.choices]
        return recipe_value(sweep, path, trial.suggest_categorical(path, stored))
    whole = all(
        isinstance(value, int)
        for value in (dimension.low, dimension.high, sweep.recipe.value(path))
    )
    suggest: Any = trial.suggest_int if whole else trial.suggest_float
    step = {"step": dimension.step} if dimension.step is not None else {}
    return suggest(path, dimension.low, dimension.last, log=dimension.log, **step)
