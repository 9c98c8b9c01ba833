"""What a study's search comes to, for those who read its results: Optuna's importances, what was
not worth training.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from kdexp import KdexpError
from kdexp.config import Choices, Dimension, Sweep
from kdexp.search.study import quiet, study_there
from kdexp.settings import Settings

__all__ = ["importances", "not_trained"]


def not_trained(sweep: Sweep, parent_run: str, settings: Settings) -> int | None:
    """How many proposals of a study, by its MLflow run, were not worth training. None where
    Optuna's storage is not here, or does not know it. Makes no storage.
    """
    try:
        with study_there(sweep, parent_run, settings) as study:
            return study.skipped
    except KdexpError:  # the search's own store: a reader of its results does without
        return None


def importances(
    search: Mapping[str, Dimension], trained: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, float]:
    """How much of what made some recipes more accurate than others each searched value explains, as
    shares of 1, largest first; given what each recipe had in the place of `search`, and its
    accuracy. Empty where all are as accurate.

    PED-ANOVA (Watanabe, Bansal & Hutter 2023, arXiv:2304.10255), of accuracy. Of size it would say
    that the learning rate made students small: the search looks at small ones longest.
    """
    quiet()
    study = optuna.create_study(direction="maximize")
    kinds = {path: _distribution(dimension) for path, dimension in search.items()}
    for chosen, accuracy in trained:
        if all(chosen[path] in dimension for path, dimension in search.items()):  # or a control's
            stored = {path: _category(search[path], value) for path, value in chosen.items()}
            study.add_trial(optuna.create_trial(params=stored, distributions=kinds, value=accuracy))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*importances will be equal")
        try:
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (UserWarning, ValueError):  # all alike, or none within what is searched
            return {}


def _category(dimension: Dimension, value: Any) -> Any:
    """A choice as text, since a list is no category to Optuna; a number as it is."""
    if not isinstance(dimension, Choices):
        return value
    plain = tuple(value) if isinstance(value, list) else value
    return json.dumps(next(choice for choice in dimension.choices if choice == plain))


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension, Choices):
        listed = [json.dumps(choice) for choice in dimension.choices]
        return optuna.distributions.CategoricalDistribution(listed)
    low, high, step = dimension.low, dimension.last, dimension.step
    if isinstance(low, int) and isinstance(high, int):
        whole = 1 if step is None else int(step)
        return optuna.distributions.IntDistribution(low, high, dimension.log, whole)
    return optuna.distributions.FloatDistribution(low, high, dimension.log, step)
