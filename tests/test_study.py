"""What Optuna is told of a training, and what it is spared."""

from __future__ import annotations

from itertools import product

import optuna
import pytest
from conftest import CPU

from kdexp.config import Sweep
from kdexp.search.study import _heard
from kdexp.search.sweep import run_sweep


def heard_of(epochs: int) -> list[int]:
    return [epoch for epoch in range(1, epochs + 1) if _heard(epoch, epochs)]


def test_optuna_hears_of_early_epochs_often_of_late_ones_seldom_and_always_of_the_last() -> None:
    assert heard_of(1) == [1]
    assert heard_of(20) == [1, 2, 3, 4, 6, 8, 11, 16, 20]
    assert heard_of(500) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 500]


@pytest.mark.parametrize(("pruner", "epochs"), [("none", []), ("median", [1, 2, 3, 4, 5])])
def test_only_a_pruner_needs_reports(tiny, settings, tracking, pruner, epochs) -> None:
    few = tiny.study.model_copy(update={"trials": 2, "pruner": pruner})
    sweep = tiny.replace({"training.epochs": 5}).model_copy(update={"study": few})
    for _ in run_sweep(sweep, settings, tracking, CPU):
        pass
    trials = optuna.load_study(study_name="tiny", storage=settings.storage_url).trials
    assert [sorted(trial.intermediate_values) for trial in trials] == [
        [e for e in epochs if e in heard_of(5)]
    ] * 2


def test_a_grid_trains_every_combination_once_its_controls_included(
    tiny, settings, tracking
) -> None:
    search = {
        "training.seed": {"choices": (8787, 1, 2)},
        "distillation.alpha": {"choices": (0.0, 0.3)},
    }
    grid = {"study": {"objective": "accuracy", "sampler": "grid", "trials": 6}, "search": search}
    sweep = Sweep.model_validate(tiny.model_dump() | grid)
    for _ in run_sweep(sweep, settings, tracking, CPU):
        pass
    runs = tracking.find("trial", {"kdexp.study": "tiny"})
    trained = [
        (int(run.params["training.seed"]), float(run.params["distillation.alpha"])) for run in runs
    ]
    assert trained[:2] == [(8787, 0.3), (8787, 0.0)]
    assert sorted(trained) == sorted(product((8787, 1, 2), (0.0, 0.3)))


def test_with_labels_only_a_grid_trains_one_of_each_however_it_would_distil(tiny) -> None:
    search = {
        "training.seed": {"choices": (tiny.training.seed, 1)},
        "distillation.alpha": {"choices": (0.0, tiny.distillation.alpha)},
        "distillation.loss": {"choices": ("kl", "correlation")},
    }
    grid = {"study": {"objective": "accuracy", "sampler": "grid", "trials": 6}, "search": search}
    points = [
        tuple(point.values())
        for point in Sweep.model_validate(tiny.model_dump() | grid).beyond_controls
    ]
    alpha = tiny.distillation.alpha
    assert points == [
        (tiny.training.seed, alpha, "correlation"),
        (1, 0.0, "kl"),
        (1, alpha, "kl"),
        (1, alpha, "correlation"),
    ]


def test_a_grid_ends_where_its_points_do(tiny) -> None:
    grid = {
        "study": {"objective": "accuracy", "sampler": "grid", "trials": 4},
        "search": {"training.seed": {"choices": (8787, 1)}},
    }
    with pytest.raises(ValueError, match=r"got 4, but the grid has 3 trials, controls included"):
        Sweep.model_validate(tiny.model_dump() | grid)
