"""What a study aims at: the numbers its sampler is told, what is not trained, and the same after
any interruption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO

import optuna
import pytest
from conftest import CPU, tiny_sweep
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kdexp import KdexpError
from kdexp.cli import _rule
from kdexp.config import Choices, Selection, Sweep
from kdexp.distill.models import ModelError, build, measure
from kdexp.distill.train import train
from kdexp.runs.tracking import Tracking
from kdexp.screen import Screen
from kdexp.search.objective import (
    DIRECTIONS,
    Passing,
    compared,
    constraints,
    dominated,
    scale,
    values,
    worst,
)
from kdexp.search.storage import StudyError
from kdexp.search.study import IN_VAIN, STUBBORN, OpenStudy
from kdexp.search.sweep import (
    EpochDone,
    NothingLeft,
    TrialFinished,
    TrialSkipped,
    TrialStarted,
    run_sweep,
)
from kdexp.select.promote import candidates, promote
from kdexp.selection import Candidate, NothingPasses, passes, select, size_of
from kdexp.settings import Settings

RULE = Selection(accuracy_bar=0.9)
accuracies = st.integers(0, 287).map(lambda correct: correct / 287)
CHANNELS = [[2, 3], [2, 4], [3, 4], [3, 6], [4, 6], [4, 8], [6, 8], [6, 12]]


def small(objective: str = "smallest", **study) -> Sweep:
    """Many sizes of students, most of which reach the bar."""
    tree = json.loads(tiny_sweep().model_dump_json())
    tree["name"] = "small"
    tree["student"] |= {"channels": [4, 8], "hidden": 16}
    tree["training"] |= {"epochs": 2, "learning_rate": 0.02}
    tree["search"]["student.channels"] = {"choices": CHANNELS}
    tree["search"]["student.hidden"] = {"low": 4, "high": 32}
    once = {"trials": 9, "sampler": "gp", "objective": objective, "repeats": 1}
    tree["study"] |= once | study
    tree["selection"]["accuracy_bar"] = 0.2
    return Sweep.model_validate_json(json.dumps(tree))


def drain(generator) -> list:
    return list(generator)


def optuna_of(settings: Settings, name: str = "small") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=settings.storage_url)


def skipped(trial: optuna.trial.FrozenTrial) -> bool:
    return "skipped" in trial.user_attrs


def sizes(sweep: Sweep, events: list, like) -> dict[int, int]:
    """Parameters of whatever was proposed, by trial number."""
    recipes = {
        event.number: event.recipe
        for event in events
        if isinstance(event, TrialStarted | TrialSkipped)
    }
    return {
        number: measure(build(recipe.student, like), like).parameters
        for number, recipe in recipes.items()
    }


# --- pure ---


@given(
    accuracies,
    accuracies,
    st.integers(1, 10**6),
    st.none() | st.integers(1, 10**6),
    st.none() | st.floats(0.51, 0.99),
)
def test_a_trial_is_feasible_where_the_selector_would_let_it_pass(
    accuracy, bar, size, limit, confidence
) -> None:
    rule = Selection(accuracy_bar=bar, limit=limit, confidence=confidence)
    told = constraints("smallest", size, accuracy, rule, 287)
    assert all(map(math.isfinite, told.values()))
    assert (max(told.values()) <= 0) == passes(
        Candidate("run", 0, size, size, size, accuracy, 287), rule
    )


@given(accuracies, accuracies)
def test_the_more_errors_the_further_from_feasible(one, other) -> None:
    first, second = (
        constraints("smallest", 1, accuracy, RULE, 287)["accuracy"] for accuracy in (one, other)
    )
    assert (first < second) == (one > other)


@given(accuracies, accuracies)
def test_a_pruner_compares_in_the_direction_of_the_study(one, other) -> None:
    for aim in ("smallest", "accuracy"):
        sign = -1 if DIRECTIONS[aim] == ("minimize",) else 1
        assert (sign * compared(aim, one) > sign * compared(aim, other)) == (one > other)


def test_each_aim_has_a_value_for_each_direction() -> None:
    assert {aim: values(aim, 70, 0.8) for aim in DIRECTIONS} == {
        "smallest": (70.0,),
        "accuracy": (0.8,),
        "pareto": (70.0, 0.8),
    }
    assert all(len(values(aim, 70, 0.8)) == len(DIRECTIONS[aim]) for aim in DIRECTIONS)
    assert (
        constraints("accuracy", 70, 0.8, RULE, 9) == constraints("pareto", 70, 0.8, RULE, 9) == {}
    )


def test_only_what_is_smaller_than_the_smallest_that_passes_is_worth_training() -> None:
    best = Passing(7, 100)
    assert dominated("smallest", 99, RULE, best) == ""
    assert dominated("smallest", 100, RULE, best) == "trial 7 meets the bar with 100"
    assert dominated("smallest", 100, RULE, None) == ""
    limited = Selection(accuracy_bar=0.9, limit=50)
    assert dominated("smallest", 51, limited, None) == "selection.limit is 50"
    assert dominated("smallest", 50, limited, best) == ""
    rounded = Selection(accuracy_bar=0.9, size="bytes", limit=50)
    assert dominated("smallest", 500, rounded, best) == "", "rounded it may be the smaller one"
    assert (
        dominated("accuracy", 500, limited, best) == dominated("pareto", 500, limited, best) == ""
    )


@given(st.lists(st.tuples(st.integers(1, 9), accuracies), min_size=1, max_size=12))
def test_leaving_out_what_is_needless_never_changes_the_selected_size(trials) -> None:
    """Trials in their order, each skipped if it is dominated after those before."""
    every = [
        Candidate(f"run{n}", n, size, size, size, accuracy)
        for n, (size, accuracy) in enumerate(trials)
    ]
    kept: list[Candidate] = []
    for candidate in every:
        passing = [Passing(other.trial, other.parameters) for other in kept if passes(other, RULE)]
        smallest = min(passing, key=lambda other: other.size, default=None)
        if not dominated("smallest", candidate.parameters, RULE, smallest):
            kept.append(candidate)

    def selected(candidates: list[Candidate]) -> int:
        try:
            return size_of(select(candidates, RULE), "parameters")
        except NothingPasses:
            return 0

    assert selected(every) == selected(kept)


def test_choices_with_an_order_are_a_scale_where_size_is_aimed_at() -> None:
    channels = Choices(choices=((16, 32, 64), (4, 8, 24), (6, 12, 16)))
    assert scale("smallest", channels) == [(6, 12, 16), (4, 8, 24), (16, 32, 64)]
    assert scale("pareto", Choices(choices=(128, 16, 0.5))) == [0.5, 16, 128]
    assert scale("accuracy", channels) is None, (
        "as studies from before there were objectives have it"
    )
    for unordered in (("adam", "sgd"), (True, False), (None, 1)):
        assert scale("smallest", Choices(choices=unordered)) is None


# --- config ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"study": {"objective": "pareto", "pruner": "median"}}, "set study.pruner to none"),
        ({"study": {"objective": "pareto", "early_stop": True}}, "set study.early_stop to false"),
        (
            {"study": {"objective": "smallest"}, "selection": {"goal": "most_accurate"}},
            "set study.objective to accuracy",
        ),
        (
            {
                "study": {"objective": "smallest"},
                "search": {"distillation.alpha": {"low": 0.0, "high": 1.0}},
            },
            "add student.channels or the like to search",
        ),
    ],
)
def test_what_makes_no_sense_together_is_said_with_what_to_set(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        Sweep.model_validate_json(json.dumps(json.loads(tiny_sweep().model_dump_json()) | changes))


# --- smallest, end to end ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store) -> Iterator[tuple]:
    """A finished study that aimed at the smallest, for every test that only reads."""
    stores = tmp_path_factory.mktemp("smallest")
    (stores / "mlflow.db").write_bytes(empty_store.read_bytes())
    settings, sweep, lanes = Settings(stores=stores), small(), []
    tracking = Tracking(settings)

    def spying(trained, *rest, **named):
        lanes.extend(trained)
        return train(trained, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdexp.workers.work.train", spying)
        events = drain(run_sweep(sweep, settings, tracking, CPU))
    return sweep, settings, tracking, events, lanes


def test_the_budget_counts_what_was_trained_and_only_that_was_trained(finished) -> None:
    sweep, settings, tracking, events, lanes = finished
    started = [event.number for event in events if isinstance(event, TrialStarted)]
    left_out = [event.number for event in events if isinstance(event, TrialSkipped)]
    assert left_out, "or this study shows nothing"
    assert started[:2] == [0, 1], "both controls are trained, though they are of one size"
    assert (
        len(started)
        == len(lanes)
        == len([e for e in events if isinstance(e, TrialFinished)])
        == sweep.study.trials
    )
    assert sorted(started + left_out) == list(range(len(started) + len(left_out)))
    trials = optuna_of(settings).trials
    assert [trial.number for trial in trials if skipped(trial)] == left_out
    assert {trial.state.name for trial in trials if skipped(trial)} == {"FAIL"}
    assert len(tracking.find("trial", {})) == sweep.study.trials, "what is not trained has no run"


def test_each_trained_student_is_smaller_than_all_that_passed_before(finished, digits) -> None:
    sweep, settings, _, events, _ = finished
    size, smallest = sizes(sweep, events, digits.train), math.inf
    for trial in optuna_of(settings).trials:
        if "control" not in trial.user_attrs:
            assert skipped(trial) == (size[trial.number] >= smallest)
        if not skipped(trial) and max(trial.constraints.values()) <= 0:
            smallest = min(smallest, size[trial.number])


def test_direction_value_and_constraint_are_stored(finished, digits) -> None:
    sweep, settings, tracking, events, _ = finished
    study, size = optuna_of(settings), sizes(sweep, events, digits.train)
    assert [direction.name for direction in study.directions] == ["MINIMIZE"]
    trained = [trial for trial in study.trials if not skipped(trial)]
    for trial in trained:
        accuracy = tracking.read(trial.user_attrs["run_id"]).metrics["val_accuracy"]
        assert trial.value == size[trial.number]
        assert trial.constraints == constraints(
            "smallest", size[trial.number], accuracy, sweep.selection, 287
        )
    chosen = select(candidates(tracking.study("small"), tracking), sweep.selection)
    assert study.best_trial.value == chosen.parameters
    assert "minimising parameters" in tracking.study("small").tags["mlflow.note.content"]


def test_choices_are_searched_as_a_scale_and_trained_as_they_are(finished) -> None:
    _, settings, _, events, _ = finished
    recipes = {event.number: event.recipe for event in events if isinstance(event, TrialStarted)}
    for number, recipe in recipes.items():
        place = optuna_of(settings).trials[number].params["student.channels"]
        assert list(recipe.student.channels) == CHANNELS[place]


def test_another_rule_would_not_compare_but_select_takes_any(finished) -> None:
    sweep, settings, tracking, _, _ = finished
    for change in ({"accuracy_bar": 0.4}, {"size": "bytes"}, {"limit": 999}):
        other = sweep.model_copy(update={"selection": sweep.selection.model_copy(update=change)})
        with pytest.raises(
            StudyError, match=rf"selection.{next(iter(change))} .* → .*kdexp select"
        ):
            drain(run_sweep(other, settings, tracking, CPU))
    low = promote(tracking.study("small"), Selection(accuracy_bar=0.1), settings, tracking, CPU)
    assert low.candidate.parameters <= optuna_of(settings).best_trial.value


def test_another_objective_is_refused(finished) -> None:
    _, settings, tracking, _, _ = finished
    with pytest.raises(StudyError, match='study.objective "smallest" → "accuracy"'):
        drain(run_sweep(small("accuracy"), settings, tracking, CPU))


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_interrupted_a_study_proposes_and_ends_like_an_unbroken_one(
    tmp_path, empty_store, sampler, monkeypatch
) -> None:
    """Closed in training, and killed between a proposal and the verdict on it: what is not trained
    is the same too.
    """
    found = []
    sweep = small(sampler=sampler, trials=8 if sampler == "gp" else 13)
    for broken in (False, True):
        stores = tmp_path / str(broken)
        stores.mkdir()
        (stores / "mlflow.db").write_bytes(empty_store.read_bytes())
        settings = Settings(stores=stores)
        tracking = Tracking(settings)
        if broken:
            interrupted(sweep, settings, tracking, monkeypatch)
        drain(run_sweep(sweep, settings, tracking, CPU))
        trials = optuna_of(settings).trials
        assert any(map(skipped, trials))
        found.append(
            [
                (trial.params, trial.state, trial.values, trial.constraints, skipped(trial))
                for trial in trials
            ]
        )
    assert found[0] == found[1]


def interrupted(sweep: Sweep, settings: Settings, tracking: Tracking, monkeypatch) -> None:
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(OpenStudy, "skip", killed)
            with pytest.raises(KeyboardInterrupt):
                drain(run_sweep(sweep, settings, tracking, CPU))
    for number in (3, 5):
        events = run_sweep(sweep, settings, tracking, CPU)
        next(event for event in events if isinstance(event, EpochDone) and event.number >= number)
        events.close()


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_study_ends_where_nothing_smaller_is_left(tmp_path, settings, tracking) -> None:
    tree = json.loads(small(sampler="random", trials=30).model_dump_json())
    tree["search"] = {
        "student.channels": {"choices": [[2, 4], [4, 8]]},
        "training.learning_rate": {"low": 0.01, "high": 0.05},
    }
    sweep = Sweep.model_validate_json(json.dumps(tree))
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    done = len([event for event in events if isinstance(event, TrialFinished)])
    assert done < 30
    chosen = select(candidates(tracking.study("small"), tracking), sweep.selection)
    assert events[-1] == NothingLeft(done, Passing(chosen.trial, chosen.parameters))
    assert len([event for event in events if isinstance(event, TrialSkipped)]) >= IN_VAIN
    again = drain(run_sweep(sweep, settings, tracking, CPU))
    assert not [event for event in again if isinstance(event, TrialStarted | TrialSkipped)], (
        "it stays at its end"
    )
    assert again[-1] == events[-1]
    shown = Console(file=StringIO(), width=200)
    with Screen(shown, 30, sweep.selection) as screen:
        for event in events:
            screen.show(event)
    lines = shown.file.getvalue().splitlines()
    assert (
        lines[-1] == f"Of the last {IN_VAIN} proposals none was smaller than trial {chosen.trial}'s"
        f" {chosen.parameters:,}: the study ends after {done} trials."
    )
    assert lines[-2].endswith(
        f" proposals not trained: trial {chosen.trial} meets the bar with {chosen.parameters:,}"
    )


@pytest.mark.parametrize("objective", ["smallest", "accuracy"])
def test_choices_that_cannot_be_built_together_are_left_out(settings, tracking, objective) -> None:
    tree = json.loads(small(objective, sampler="random", trials=4).model_dump_json())
    tree["selection"]["accuracy_bar"] = 0.99
    tree["search"] = {
        "student.channels": {"choices": [[4, 8], [4, 6, 8]]},
        "student.stride": {"choices": [1, 2]},
        "training.learning_rate": {"low": 0.01, "high": 0.05},
    }
    events = drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    assert len([event for event in events if isinstance(event, TrialFinished)]) == 4
    left_out = [event for event in events if isinstance(event, TrialSkipped)]
    assert left_out
    for event in left_out:
        assert (event.recipe.student.channels, event.recipe.student.stride) == ((4, 6, 8), 2)
        assert "halvings leave nothing" in event.why


def test_nothing_is_trained_twice_and_a_finite_space_ends_the_study(settings, tracking) -> None:
    tree = json.loads(small("accuracy", sampler="tpe", trials=12).model_dump_json())
    tree["search"] = {
        "student.channels": {"choices": [[2, 4], [4, 8]]},
        "distillation.alpha": {"choices": [0.0, 0.3]},
        "distillation.temperature": {"choices": [2.0, 5.0]},
    }
    events = drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    recipes = [event.recipe for event in events if isinstance(event, TrialStarted)]
    alphas = sorted((recipe.student.channels, recipe.distillation.alpha) for recipe in recipes)
    assert alphas == sorted(2 * [((2, 4), 0.3), ((4, 8), 0.3)] + [((2, 4), 0.0), ((4, 8), 0.0)]), (
        "labels only: whatever T"
    )
    assert events[-1] == NothingLeft(6, None)
    assert all(
        event.why.endswith(" trains the same")
        for event in events
        if isinstance(event, TrialSkipped)
    )


def test_students_that_cannot_be_built_are_found_out_before_the_teacher_is_trained(
    settings, tracking
) -> None:
    sweep = small().model_copy(
        update={"search": {"student.channels": Choices(choices=((4, 8), (4, 8, 16, 32)))}}
    )
    with pytest.raises(ModelError, match="4 halvings leave nothing of 8x8 pixels"):
        drain(run_sweep(sweep, settings, tracking, CPU))
    assert not list(settings.teachers.glob("*/*.safetensors"))


def test_a_bar_out_of_reach_of_any_student_is_said_before_trials(settings, tracking) -> None:
    sweep = small().model_copy(update={"selection": Selection(accuracy_bar=0.995, confidence=0.95)})
    with pytest.raises(
        KdexpError,
        match=r"no student can meet 99.50 % on 287 validation images: .* lower end is 99.07 %",
    ):
        drain(run_sweep(sweep, settings, tracking, CPU))
    assert not tracking.find("trial", {})


def test_where_trials_are_ended_by_the_bar_it_stays(settings, tracking) -> None:
    sweep = small("accuracy", early_stop=True, sampler="random", trials=2)
    drain(run_sweep(sweep, settings, tracking, CPU))
    other = sweep.model_copy(update={"selection": Selection(accuracy_bar=0.1)})
    with pytest.raises(StudyError, match=r"selection.accuracy_bar 0.2 → 0.1"):
        drain(run_sweep(other, settings, tracking, CPU))
    drain(
        run_sweep(
            sweep.model_copy(update={"selection": Selection(accuracy_bar=0.2, size="bytes")}),
            settings,
            tracking,
            CPU,
        )
    )


def test_another_unit_takes_the_limit_of_the_former_away(settings, tracking) -> None:
    sweep = small("accuracy", sampler="random", trials=2)
    drain(
        run_sweep(
            sweep.model_copy(update={"selection": Selection(limit=10_000)}), settings, tracking, CPU
        )
    )

    def rule(**given: object) -> Selection:
        nothing = {
            "bar": 0.3,
            "size": None,
            "limit": None,
            "confidence": None,
            "most_accurate": False,
        }
        return _rule("small", tracking, nothing | given)

    assert rule() == Selection(accuracy_bar=0.3, limit=10_000)
    assert rule(size="bytes") == Selection(accuracy_bar=0.3, size="bytes")
    assert rule(size="bytes", limit=99) == Selection(accuracy_bar=0.3, size="bytes", limit=99)


def test_students_over_the_limit_are_not_trained_but_controls_are(
    settings, tracking, digits
) -> None:
    sweep = small(sampler="random", trials=5)
    sweep = sweep.model_copy(update={"selection": Selection(accuracy_bar=0.99, limit=700)})
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    size = sizes(sweep, events, digits.train)
    for event in events:
        if isinstance(event, TrialSkipped):
            assert size[event.number] > 700
            assert event.why == "selection.limit is 700"
    trained = [trial for trial in optuna_of(settings).trials if not skipped(trial)]
    assert [trial.value > 700 for trial in trained] == [True, True, False, False, False]
    assert [trial.constraints["size"] > 0 for trial in trained] == [True, True, False, False, False]


@pytest.mark.parametrize("workers", [1, 2])
def test_where_all_is_over_the_limit_the_study_says_so_once(settings, tracking, workers) -> None:
    sweep = small(sampler="random", trials=5).model_copy(
        update={"selection": Selection(accuracy_bar=0.9, limit=10)}
    )
    events = drain(run_sweep(sweep, replace(settings, workers=workers, threads=1), tracking, CPU))
    assert [event for event in events if isinstance(event, NothingLeft)] == [NothingLeft(2, None)]


def test_two_packs_and_two_workers_share_the_budget(settings, tracking) -> None:
    for pack, workers, name in ((4, 1, "packs"), (1, 2, "workers")):
        sweep = small(sampler="random", trials=6).model_copy(update={"name": name})
        events = drain(
            run_sweep(
                sweep, replace(settings, pack=pack, workers=workers, threads=1), tracking, CPU
            )
        )
        trained = sorted(event.number for event in events if isinstance(event, TrialFinished))
        left_out = sorted(event.number for event in events if isinstance(event, TrialSkipped))
        trials = optuna_of(settings, name).trials
        assert trained == [trial.number for trial in trials if not skipped(trial)]
        assert left_out == [trial.number for trial in trials if skipped(trial)]
        assert len(trained) == 6


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [("tpe", "median"), ("gp", "hyperband"), ("random", "successive_halving")],
)
def test_pruners_get_errors_and_what_is_pruned_below_the_bar_is_infeasible(
    settings, tracking, sampler, pruner
) -> None:
    sweep = small(sampler=sampler, pruner=pruner, trials=8).replace({"training.epochs": 4})
    drain(run_sweep(sweep, settings, tracking, CPU))
    for trial in optuna_of(settings).trials:
        if skipped(trial):
            continue
        run = tracking.read(trial.user_attrs["run_id"])
        curve = [value for _, value in tracking.history(run.run_id, "epoch/val_accuracy")]
        heard = [1 - curve[epoch - 1] for epoch in sorted(trial.intermediate_values)]
        assert list(trial.intermediate_values.values()) == pytest.approx(heard)
        passed = run.metrics["val_accuracy"] >= sweep.selection.accuracy_bar
        assert passed == (trial.constraints["accuracy"] <= 0)
        whole = run.tags["kdexp.state"] == "complete"
        assert trial.user_attrs.get("ended", "complete") == run.tags["kdexp.state"]
        assert trial.state.name == (
            "COMPLETE" if passed or whole or sampler == "gp" else "PRUNED"
        ), "gp reads no PRUNED trial"


def test_a_diverged_trial_is_infeasible_and_the_study_goes_on(settings, tracking) -> None:
    tree = json.loads(small(sampler="tpe", trials=4).model_dump_json())
    tree["training"] |= {"optimizer": "sgd", "learning_rate": 1e30, "schedule": "constant"}
    del tree["search"]["training.learning_rate"]
    events = drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    assert [e.outcome.state for e in events if isinstance(e, TrialFinished)] == ["diverged"] * 4
    for trial in optuna_of(settings).trials:
        assert (trial.state.name, trial.user_attrs["ended"]) == ("COMPLETE", "diverged")
        assert trial.constraints == constraints(
            "smallest", int(trial.value), 0.0, small().selection, 287
        ), "the worst there is"


def test_a_trial_whose_run_was_closed_but_never_told_is_told_with_its_size(
    settings, tracking, monkeypatch
) -> None:
    sweep = small(trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(OpenStudy, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            drain(run_sweep(sweep, settings, tracking, CPU))
    drain(run_sweep(sweep, settings, tracking, CPU))
    first, second = optuna_of(settings).trials
    assert first.value == second.value > 0
    assert set(first.constraints) == set(second.constraints) == {"accuracy"}


def test_what_was_told_half_is_told_once_more_without_a_warning(
    settings, tracking, monkeypatch, recwarn
) -> None:
    sweep = small(trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", killed)  # the constraint is stored, the value is not
        with pytest.raises(KeyboardInterrupt):
            drain(run_sweep(sweep, settings, tracking, CPU))
    drain(run_sweep(sweep, settings, tracking, CPU))
    assert not [warning for warning in recwarn if "constraint" in str(warning.message)]
    assert [trial.state.name for trial in optuna_of(settings).trials] == ["COMPLETE"] * 2


# --- the other aims ---


def test_a_study_from_before_there_were_objectives_goes_on_as_it_was(settings, tracking) -> None:
    sweep = small("accuracy", sampler="tpe", trials=3)
    drain(run_sweep(sweep, settings, tracking, CPU))
    study = optuna_of(settings)
    tree = json.loads(study.user_attrs["sweep"])
    del tree["study"]["objective"]
    study.set_user_attr("sweep", json.dumps(tree))
    more = sweep.model_copy(update={"study": sweep.study.model_copy(update={"trials": 4})})
    events = drain(run_sweep(more, settings, tracking, CPU))
    assert [event.number for event in events if isinstance(event, TrialFinished)] == [3]


def test_an_accuracy_study_trains_every_proposal_and_its_rule_may_change(
    settings, tracking
) -> None:
    sweep = small("accuracy", sampler="random", trials=6)
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    assert not [event for event in events if isinstance(event, TrialSkipped)]
    study = optuna_of(settings)
    assert study.direction.name == "MAXIMIZE"
    assert all(not trial.constraints for trial in study.trials)
    other = sweep.model_copy(
        update={"selection": Selection(accuracy_bar=0.3, size="bytes", goal="most_accurate")}
    )
    drain(run_sweep(other, settings, tracking, CPU))


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_a_pareto_study_has_two_values_for_each_trial_its_controls_among_them(
    settings, tracking, digits, sampler
) -> None:
    sweep = small("pareto", sampler=sampler, trials=7 if sampler == "gp" else 12)
    events = drain(run_sweep(sweep, settings, tracking, CPU))
    assert not [event for event in events if isinstance(event, TrialSkipped)]
    study, size = optuna_of(settings), sizes(sweep, events, digits.train)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    for trial in study.trials:
        accuracy = tracking.read(trial.user_attrs["run_id"]).metrics["val_accuracy"]
        assert trial.values == [size[trial.number], accuracy]
    assert [trial.user_attrs["control"] for trial in study.trials[:2]] == [
        "documented defaults",
        "labels only",
    ]
    assert study.best_trials
    with pytest.raises(StudyError, match=r'selection.size "parameters" → "bytes"'):
        drain(
            run_sweep(
                sweep.model_copy(update={"selection": Selection(size="bytes")}),
                settings,
                tracking,
                CPU,
            )
        )
    promote(tracking.study("small"), Selection(accuracy_bar=0.1), settings, tracking, CPU)


def test_a_diverged_trial_is_on_no_frontier_however_small_its_student(settings, tracking) -> None:
    tree = json.loads(small("pareto", sampler="random", trials=5).model_dump_json())
    tree["training"] |= {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "schedule": "constant",
        "seed": 1,
    }
    tree["search"]["training.learning_rate"] = {"choices": [0.1, 1e30]}
    drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    study = optuna_of(settings)
    diverged = [trial for trial in study.trials if trial.user_attrs.get("ended") == "diverged"]
    assert 0 < len(diverged) < 5
    assert all(trial.state.name == "COMPLETE" and trial.values[1] == 0.0 for trial in diverged)
    assert not {trial.number for trial in study.best_trials} & {trial.number for trial in diverged}


def test_a_training_that_came_to_nothing_is_worse_than_any_other() -> None:
    assert worst("smallest", 70, [(50.0,), (90.0,)]) == (70.0,), (
        "that it misses the bar, its constraint says"
    )
    assert worst("accuracy", 70, [(0.4,)]) == (0.0,)
    assert worst("pareto", 70, [(50.0, 0.4), (90.0, 0.8)]) == (90.0, 0.0)
    assert worst("pareto", 70, []) == (70.0, 0.0)


def test_a_study_that_was_never_set_up_does_not_go_on_with_another_objective(
    settings, tracking, monkeypatch
) -> None:
    def away(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdexp.search.sweep._new_parent_run", away)
        with pytest.raises(KeyboardInterrupt):
            drain(run_sweep(small(), settings, tracking, CPU))
    with pytest.raises(StudyError, match="begun with another study.objective than accuracy"):
        drain(run_sweep(small("accuracy"), settings, tracking, CPU))


def test_the_random_draws_begin_after_a_few_proposals_in_vain() -> None:
    from kdexp.search.study import _sampler

    kinds = [
        type(_sampler(small(), 20, untrained)).__name__
        for untrained in (0, STUBBORN - 1, STUBBORN, 50)
    ]
    assert kinds == ["GPSampler", "GPSampler", "RandomSampler", "RandomSampler"]


@pytest.mark.parametrize("unit", ["multiply_adds", "activation_bytes"])
def test_sizes_are_those_of_the_rule(settings, tracking, unit) -> None:
    sweep = small(trials=2).model_copy(update={"selection": Selection(accuracy_bar=0.5, size=unit)})
    drain(run_sweep(sweep, settings, tracking, CPU))
    run = tracking.find("trial", {})[0]
    assert optuna_of(settings).trials[0].value == run.metrics[unit]
