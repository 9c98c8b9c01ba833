"""A search does not get stuck: its sampler learns from every trial, however that ended, and nothing
is trained nearly twice.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from contextlib import closing
from types import SimpleNamespace

import hypothesis
import pytest
from conftest import CPU, tiny_sweep
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import create_trial
from test_objective import drain, optuna_of, skipped

import kdexp.search.sweep as sweep_module
from benchmarks.searching import different
from kdexp.config import Choices, Range, Recipe, Sweep
from kdexp.distill.datasets import load_splits
from kdexp.distill.models import Size, measure, outline
from kdexp.patience import PATIENCE
from kdexp.runs.bench import Bench
from kdexp.search.claims import Claimant
from kdexp.search.scheduler import Scheduler
from kdexp.search.space import NEAR, nearly_alike
from kdexp.search.study import NARROW, check_study, open_study
from kdexp.search.sweep import NothingLeft, TrialFinished, TrialSkipped, TrialStarted, run_sweep
from kdexp.select.promote import candidates
from kdexp.selection import passes
from kdexp.settings import Settings


def risky(**study) -> Sweep:
    """Small students, of whom half reach the bar, at learning rates of which the upper seventh
    (from 1e4 on) explodes.
    """
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["name"] = "small"
    tree["data"]["augment"] = {"flip": False, "shift": 0}
    tree["student"] |= {"channels": [4, 8], "hidden": 16}
    tree["training"] |= {
        "optimizer": "sgd",
        "schedule": "constant",
        "learning_rate": 0.1,
        "epochs": 3,
        "batch_size": 32,
    }
    tree["search"] = {
        "training.learning_rate": {"low": 0.01, "high": 1e5, "log": True},
        "distillation.alpha": {"low": 0.0, "high": 1.0},
        "student.channels": {"choices": [[2, 3], [3, 4], [4, 6], [4, 8]]},
        "student.hidden": {"low": 4, "high": 16},
    }
    tree["study"] |= {"trials": 12, "objective": "smallest", "repeats": 1} | study
    tree["selection"] = {"accuracy_bar": 0.75}
    return Sweep.model_validate_json(json.dumps(tree))


# --- what is nearly the same ---

SEARCH, OWN = risky().search, risky().recipe


def recipe(**values) -> Recipe:
    return OWN.replace({path.replace("__", "."): value for path, value in values.items()})


def test_numbers_within_a_hundredth_of_their_range_are_nearly_the_same_on_the_scale_that_is_searched() -> (
    None
):
    one = recipe(training__learning_rate=1.0, distillation__alpha=0.5)
    decades = math.log10(1e5 / 0.01)
    for share, same in ((0.9, True), (1.1, False)):
        for sign in (-1, 1):
            factor = 10 ** (sign * share * NEAR * decades)
            assert (
                nearly_alike(
                    one, recipe(training__learning_rate=factor, distillation__alpha=0.5), SEARCH
                )
                == same
            )
            other = recipe(
                training__learning_rate=1.0, distillation__alpha=0.5 + sign * share * NEAR
            )
            assert nearly_alike(one, other, SEARCH) == same
    assert not nearly_alike(
        one,
        recipe(training__learning_rate=1.0, distillation__alpha=0.5, student__hidden=15),
        SEARCH,
    )
    assert not nearly_alike(
        one,
        recipe(training__learning_rate=1.0, distillation__alpha=0.5, student__channels=[4, 6]),
        SEARCH,
    )


def test_neighbours_on_a_step_of_a_hundredth_are_not_the_same_and_seeds_never_are() -> None:
    steps = {"distillation.alpha": Range(low=0.0, high=1.0, step=0.01)}
    assert not nearly_alike(
        recipe(distillation__alpha=0.29), recipe(distillation__alpha=0.3), steps
    )
    seeds = {"training.seed": Range(low=0, high=10**6)}
    assert not nearly_alike(recipe(training__seed=1), recipe(training__seed=2), seeds)
    choices = {"distillation.alpha": Choices(choices=(0.3, 0.3001))}
    assert not nearly_alike(
        recipe(distillation__alpha=0.3), recipe(distillation__alpha=0.3001), choices
    )


def test_with_labels_only_it_does_not_matter_how_they_would_distil_and_a_control_may_lie_outside_the_range() -> (
    None
):
    search = {
        "distillation.temperature": Range(low=1.0, high=20.0, log=True),
        "student.hidden": Range(low=4, high=16),
    }
    one, other = (
        recipe(distillation__alpha=0.0, distillation__temperature=float(t)) for t in (2, 9)
    )
    assert nearly_alike(one, other, search)
    assert not nearly_alike(
        one, recipe(distillation__alpha=0.3, distillation__temperature=2.0), search
    ), "another alpha"
    log = {"distillation.alpha": Range(low=0.01, high=1.0, log=True)}
    assert not nearly_alike(recipe(distillation__alpha=0.0), recipe(distillation__alpha=0.01), log)


@hypothesis.settings(deadline=None, max_examples=50)
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
    ended = {event.number: event.outcome for event in events if isinstance(event, TrialFinished)}
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


def told_as_formerly(settings) -> None:
    """What was stopped or diverged, as versions stored it that told a sampler nothing: PRUNED,
    without values.
    """
    with closing(sqlite3.connect(settings.stores / "optuna.db")) as database, database:
        early = "(select trial_id from trial_user_attributes where key = 'ended')"
        database.execute(f"update trials set state = 'PRUNED' where trial_id in {early}")
        database.execute(f"delete from trial_values where trial_id in {early}")
        database.execute("delete from trial_user_attributes where key = 'ended'")


def test_a_study_of_a_former_version_goes_on_and_does_not_repeat_what_it_had_pruned(
    settings, tracking
) -> None:
    sweep = risky(sampler="gp", trials=7, seed=2)
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    told_as_formerly(settings)
    states = [trial.state.name for trial in optuna_of(settings).trials]
    assert "PRUNED" in states, "or this study shows nothing"
    events += drain(run_sweep(risky(sampler="gp", trials=9, seed=2), settings, tracking, CPU))
    trained = [event.recipe for event in events if isinstance(event, TrialStarted)]
    assert different(trained, sweep) == len(trained) == 9
    assert [trial.state.name for trial in optuna_of(settings).trials][: len(states)] == states


def test_where_the_space_holds_nothing_else_a_near_repeat_is_trained(settings, tracking) -> None:
    """A hundred trials a hundredth apart: whatever is proposed now lies near one of them, and the
    study still has room.
    """

    def narrow(trials: int) -> Sweep:
        search = {"distillation.alpha": {"low": 0.0, "high": 1.0}}
        return Sweep.model_validate(
            tiny_sweep().model_dump()
            | {
                "search": search,
                "study": {"trials": trials, "objective": "accuracy", "sampler": "tpe"},
            }
        )

    drain(run_sweep(narrow(2), settings, tracking, CPU))
    study = optuna_of(settings, "tiny")
    like = study.trials[0]
    taken = sorted(trial.params["distillation.alpha"] for trial in study.trials)
    for number in range(100):
        params = {"distillation.alpha": (number + 0.5) / 100}
        study.add_trial(create_trial(params=params, distributions=like.distributions, value=0.5))
    events = drain(run_sweep(narrow(104), settings, tracking, CPU))
    trained = [event for event in events if isinstance(event, TrialFinished)]
    left_out = [event for event in events if isinstance(event, TrialSkipped)]
    assert len(trained) == 2, taken
    assert not [event for event in events if isinstance(event, NothingLeft)]
    assert len(left_out) == 2 * NARROW
    assert all(event.why.endswith(" trains nearly the same") for event in left_out)


def test_a_smaller_student_is_no_repeat_of_its_like_where_the_smallest_is_searched_for(
    settings, tracking
) -> None:
    tree = json.loads(risky(sampler="random", trials=2).model_dump_json())
    tree["search"] = {"student.hidden": {"low": 1, "high": 2000}}
    tree["student"]["hidden"] = 16
    tree["selection"]["accuracy_bar"] = 0.99
    sweep = Sweep.model_validate_json(json.dumps(tree))
    drain(run_sweep(sweep, settings, tracking, CPU))
    with Claimant(settings) as claimant:
        study = open_study(
            sweep.model_copy(update={"study": sweep.study.model_copy(update={"trials": 9})}),
            settings,
            str,
        )
        optuna_of(settings).enqueue_trial({"student.hidden": 15})
        trial = study.next_trial(claimant, lambda number: None)
        assert trial is not None
        assert [recipe.student.hidden for recipe in study.like(trial).values()] == [16], (
            "the labels-only control has another alpha"
        )
        splits = load_splits(sweep.data)
        prepared = SimpleNamespace(splits=splits)
        here = Scheduler(study, prepared, Bench(settings, tracking, CPU), claimant, pool=None)  # type: ignore[arg-type]
        own, larger = (
            measure(outline(network, splits.train), splits.train)
            for network in (trial.recipe.student, sweep.student)
        )
        assert here._repeats(trial, own) == ""
        assert here._repeats(trial, larger) == "trial 0 trains nearly the same"


# --- who trains, and what training does not wait for ---


def test_early_stopping_does_not_wait_for_a_database_that_is_locked(tmp_path) -> None:
    settings = Settings(stores=tmp_path / "mlruns", storage=f"sqlite:///{tmp_path / 'own.db'}")
    sweep = risky(early_stop=True)
    check_study(sweep, settings)
    study = open_study(sweep, settings, str)
    with closing(sqlite3.connect(tmp_path / "own.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        since = time.monotonic()
        assert not study.futile(Size(9, 9, 9), [0.1], 3, 287)
        assert time.monotonic() - since < PATIENCE / 2, "SQLite itself waits for five seconds"
        other.execute("rollback")
    assert not study.futile(Size(9, 9, 9), [0.1], 3, 287)


def test_a_study_that_ends_leaves_the_checkpoints_of_a_command_that_goes_on_with_it(
    settings, tracking, monkeypatch
) -> None:
    """It has raised the budget and taken a trial before the first command has cleared up."""
    sweep, kept = risky(sampler="random", trials=2), []
    more = sweep.model_copy(update={"study": sweep.study.model_copy(update={"trials": 3})})
    really = sweep_module.leave

    def leaving(*args, **named) -> int:
        others = really(*args, **named)
        study, claimant = open_study(more, settings, str), Claimant(settings)
        claimant.__enter__()
        assert study.next_trial(claimant, lambda number: None) is not None
        folder = study.checkpoints(settings).folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial-2.checkpoint").write_bytes(b"kept")
        kept.extend([claimant, folder / "trial-2.checkpoint"])
        return others

    monkeypatch.setattr(sweep_module, "leave", leaving)
    drain(run_sweep(sweep, settings, tracking, CPU))
    claimant, checkpoint = kept
    assert checkpoint.read_bytes() == b"kept"
    claimant.__exit__()
    monkeypatch.setattr(sweep_module, "leave", really)
    drain(run_sweep(more, settings, tracking, CPU))
    assert not checkpoint.parent.exists(), "the last one clears up"
