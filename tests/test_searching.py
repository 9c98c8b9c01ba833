"""A search does not get stuck: its sampler learns from every trial, however that ended, and nothing is trained nearly twice."""

from __future__ import annotations

import json
import math

import optuna
import pytest
from conftest import CPU, tiny_sweep
from hypothesis import given
from hypothesis import strategies as st
from test_objective import drain, optuna_of, skipped
from test_sweep import interrupt_at

from benchmarks.searching import different
from kdexp.config import NEAR, Choices, Range, Recipe, Selection, Sweep, nearly_alike
from kdexp.promote import candidates
from kdexp.selection import passes
from kdexp.study import NARROW, OpenStudy, open_study
from kdexp.sweep import EpochDone, NothingLeft, TrialFinished, TrialSkipped, TrialStarted, run_sweep

EXPLODES = 1e4
"""At this learning rate every training of these students diverges: a seventh of the range, on its scale."""


def risky(**study) -> Sweep:
    """Small students, of whom half reach the bar, at learning rates some of which explode."""
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["name"] = "small"
    tree["data"]["augment"] = {"flip": False, "shift": 0}
    tree["student"] |= {"channels": [4, 8], "hidden": 16}
    tree["training"] |= {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.1, "epochs": 3, "batch_size": 32}
    tree["search"] = {
        "training.learning_rate": {"low": 0.01, "high": 1e5, "log": True},
        "distillation.alpha": {"low": 0.0, "high": 1.0},
        "student.channels": {"choices": [[2, 3], [3, 4], [4, 6], [4, 8]]},
        "student.hidden": {"low": 4, "high": 16},
    }
    tree["study"] |= {"trials": 12, "objective": "smallest"} | study
    tree["selection"] = {"accuracy_bar": 0.75}
    return Sweep.model_validate_json(json.dumps(tree))


# --- what is nearly the same ---

SEARCH = risky().search


def recipe(**values) -> Recipe:
    return risky().recipe.replace({path.replace("__", "."): value for path, value in values.items()})


def test_numbers_within_a_hundredth_of_their_range_are_nearly_the_same_on_the_scale_that_is_searched() -> None:
    one = recipe(training__learning_rate=1.0, distillation__alpha=0.5)
    decades = math.log10(1e5 / 0.01)
    for share, same in ((0.9, True), (1.1, False)):
        for sign in (-1, 1):
            factor = 10 ** (sign * share * NEAR * decades)
            assert nearly_alike(one, recipe(training__learning_rate=factor, distillation__alpha=0.5), SEARCH) == same
            other = recipe(training__learning_rate=1.0, distillation__alpha=0.5 + sign * share * NEAR)
            assert nearly_alike(one, other, SEARCH) == same
    assert not nearly_alike(one, recipe(training__learning_rate=1.0, distillation__alpha=0.5, student__hidden=15), SEARCH)
    assert not nearly_alike(one, recipe(training__learning_rate=1.0, distillation__alpha=0.5, student__channels=[4, 6]), SEARCH)


def test_neighbours_on_a_step_of_a_hundredth_are_not_the_same_and_seeds_never_are() -> None:
    steps = {"distillation.alpha": Range(low=0.0, high=1.0, step=0.01)}
    assert not nearly_alike(recipe(distillation__alpha=0.29), recipe(distillation__alpha=0.3), steps)
    seeds = {"training.seed": Range(low=0, high=10**6)}
    assert not nearly_alike(recipe(training__seed=1), recipe(training__seed=2), seeds)
    choices = {"distillation.alpha": Choices(choices=(0.3, 0.3001))}
    assert not nearly_alike(recipe(distillation__alpha=0.3), recipe(distillation__alpha=0.3001), choices)


def test_with_labels_only_it_does_not_matter_how_they_would_distil_and_a_control_may_lie_outside_the_range() -> None:
    search = {"distillation.temperature": Range(low=1.0, high=20.0, log=True), "student.hidden": Range(low=4, high=16)}
    one, other = (recipe(distillation__alpha=0.0, distillation__temperature=float(t)) for t in (2, 9))
    assert nearly_alike(one, other, search)
    assert not nearly_alike(one, recipe(distillation__alpha=0.3, distillation__temperature=2.0), search), "alpha is not searched"
    log = {"distillation.alpha": Range(low=0.01, high=1.0, log=True)}
    assert not nearly_alike(recipe(distillation__alpha=0.0), recipe(distillation__alpha=0.01), log)


@given(st.floats(0.01, 1e5), st.floats(0.01, 1e5))
def test_nearness_is_symmetric_and_everything_is_near_itself(one, other) -> None:
    first, second = recipe(training__learning_rate=one), recipe(training__learning_rate=other)
    assert nearly_alike(first, first, SEARCH)
    assert nearly_alike(first, second, SEARCH) == nearly_alike(second, first, SEARCH)


# --- whole searches ---


@pytest.mark.parametrize(
    ("sampler", "early_stop", "objective"),
    [
        ("gp", True, "smallest"),
        ("tpe", False, "smallest"),
        ("random", True, "smallest"),
        ("gp", True, "accuracy"),
        ("gp", False, "pareto"),
    ],
)
def test_a_search_beside_a_region_that_diverges_trains_different_recipes_and_finds_a_size(
    settings, tracking, sampler, early_stop, objective
) -> None:
    sweep = risky(sampler=sampler, early_stop=early_stop, objective=objective, seed=2)
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    trained = [event.recipe for event in events if isinstance(event, TrialStarted)]
    ended = {event.number: event.result for event in events if isinstance(event, TrialFinished)}
    assert len(trained) == len(ended) == 12
    assert different(trained, sweep) == 12
    study, every = optuna_of(settings), candidates(tracking.study("small"), tracking)
    told = [trial for trial in study.trials if not skipped(trial)]
    for trial in told:
        assert trial.user_attrs.get("ended", "complete") == ended[trial.number].state
        assert trial.values is not None, "every ended trial teaches"
        assert all(map(math.isfinite, [*trial.values, *trial.constraints.values()]))
    diverged = [result for result in ended.values() if result.state == "diverged"]
    assert len(diverged) <= 4, "it does not go where trainings diverge again and again"
    best = study.best_trials if objective == "pareto" else [study.best_trial]
    assert all(trial.user_attrs.get("ended") is None for trial in best)
    if objective == "smallest":
        sizes = [c.parameters for c in every if passes(c, sweep.selection)]
        assert min(sizes) == study.best_value < 1_400, "smaller than trial 0's"
