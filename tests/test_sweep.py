"""A study end to end on real stores: controls, record, resume, selection, reproduction."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from conftest import CPU, drain, tiny_sweep
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from kdexp import KdexpError
from kdexp.config import ConfigError, Recipe, Selection, Student, Sweep, flatten
from kdexp.distill import datasets as data_module
from kdexp.distill.datasets import load_test
from kdexp.distill.models import weights_hash
from kdexp.distill.randomness import seed_of
from kdexp.distill.train import EPOCH_METRICS, EpochReport, train
from kdexp.runs.bench import Bench
from kdexp.runs.describe import named
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, recorded
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import Tracking, TrackingError
from kdexp.search.storage import StudyError
from kdexp.search.study import OpenStudy
from kdexp.search.sweep import (
    EpochDone,
    TrialFailed,
    TrialFinished,
    TrialStarted,
    TrialTaken,
    _new_parent_run,
    run_sweep,
)
from kdexp.select.promote import candidates, gain, promote, sweep_of
from kdexp.select.reproduce import reproduce
from kdexp.selection import NothingPasses
from kdexp.settings import Settings


def rows(settings: Settings, query: str) -> list:
    with sqlite3.connect(settings.stores / "mlflow.db") as database:
        return database.execute(query).fetchall()


def statuses(settings: Settings, kind: str) -> Counter:
    return Counter(
        status
        for (status,) in rows(
            settings,
            "select status from runs join tags using (run_uuid) where tags.key = 'kdexp.kind' and"
            f" tags.value = '{kind}'",
        )
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store):
    """One finished study, for every test that only reads."""
    stores = tmp_path_factory.mktemp("finished")
    shutil.copy(empty_store, stores / "mlflow.db")
    settings = Settings(stores=stores)
    sweep = tiny_sweep()
    tracking = Tracking(settings)
    received = []

    def spying(lanes, *rest, **named):
        received.extend(lanes)
        return train(lanes, *rest, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr("kdexp.workers.work.train", spying)
    events, others = drain(run_sweep(sweep, settings, tracking, CPU))
    patch.undo()
    assert others == 0
    return sweep, settings, tracking, events, received


def study_of(finished) -> optuna.Study:
    sweep, settings, *_ = finished
    return optuna.load_study(study_name=sweep.name, storage=settings.storage_url)


def test_the_trainer_received_exactly_what_optuna_chose(finished) -> None:
    sweep, _, _, _, received = finished
    trials = study_of(finished).trials
    assert len(trials) == len(received) == 4
    for trial, lane in zip(trials, received, strict=True):
        assert lane.distillation.alpha == trial.params["distillation.alpha"]
        assert lane.distillation.temperature == trial.params["distillation.temperature"]
        assert lane.training.learning_rate == trial.params["training.learning_rate"]
        assert list(lane.network.channels) == json.loads(trial.params["student.channels"])
        untouched = lane.training.model_copy(update={"learning_rate": sweep.training.learning_rate})
        assert untouched == sweep.training


def test_trial_0_is_the_recipe_and_trial_1_the_same_without_the_teacher(finished) -> None:
    sweep, _, _, events, _ = finished
    recipes = {event.number: event.recipe for event in events if isinstance(event, TrialStarted)}
    assert recipes[0] == sweep.recipe
    assert recipes[1] == sweep.recipe.replace({"distillation.alpha": 0.0})
    assert recipes[2] not in (recipes[0], recipes[1])


def test_every_trial_is_a_child_run_with_params_curves_metrics_and_artifacts(
    finished, tmp_path
) -> None:
    sweep, _settings, tracking, events, _ = finished
    study = tracking.study(sweep.name)
    assert study.status == "FINISHED"
    runs = tracking.find("trial", {"mlflow.parentRunId": study.run_id})
    recipes = {event.number: event.recipe for event in events if isinstance(event, TrialStarted)}
    assert len(runs) == 4
    for run in runs:
        number = int(run.tags["kdexp.trial"])
        assert run.status == "FINISHED"
        assert run.params["trial"] == str(number)
        for path, value in flatten(recipes[number]).items():
            assert run.params[path] == (value if isinstance(value, str) else json.dumps(value))
        assert {
            "parameters",
            "multiply_adds",
            "model_bytes",
            "activation_bytes",
            "val_accuracy",
            "val_accuracy_low",
            "val_accuracy_high",
        } <= set(run.metrics)
        assert (
            run.metrics["val_accuracy_low"]
            <= run.metrics["val_accuracy"]
            <= run.metrics["val_accuracy_high"]
        )
        for name in EPOCH_METRICS:
            assert [step for step, _ in tracking.history(run.run_id, f"epoch/{name}")] == [1, 2, 3]
        best = max(value for _, value in tracking.history(run.run_id, "epoch/val_accuracy"))
        assert run.metrics["val_accuracy"] == best
        for artifact in (
            "config.json",
            "input.json",
            "environment.json",
            "model_summary.txt",
            "weights.safetensors",
            "curves.png",
        ):
            assert tracking.download(run.run_id, artifact, tmp_path).stat().st_size > 0
        recorded = Recipe.model_validate_json((tmp_path / "config.json").read_text())
        assert recorded == recipes[number]
        assert (
            weights_hash(load_file(tmp_path / "weights.safetensors"))
            == run.tags["kdexp.weights_sha256"]
        )
        assert f"{int(run.metrics['parameters']):,}" in (tmp_path / "model_summary.txt").read_text()
        assert "kdexp reproduce" in run.tags["mlflow.note.content"]


def test_study_and_parent_run_and_trial_and_child_run_know_each_other(finished) -> None:
    sweep, _, tracking, _, _ = finished
    study, parent = study_of(finished), tracking.study(sweep.name)
    assert study.user_attrs["mlflow_run_id"] == parent.run_id
    for trial in study.trials:
        run = tracking.read(trial.user_attrs["run_id"])
        assert (run.tags["kdexp.trial"], run.tags["mlflow.parentRunId"]) == (
            str(trial.number),
            parent.run_id,
        )
        assert trial.value == run.metrics["val_accuracy"]


def test_datasets_are_recorded_as_inputs_and_the_test_split_is_not_among_them(finished) -> None:
    sweep, _settings, tracking, _, _ = finished
    runs = [run.run_id for run in tracking.find("trial", {"kdexp.study": sweep.name})]
    for run_id in runs:
        inputs = tracking.client.get_run(run_id).inputs.dataset_inputs
        assert {tag.value for one in inputs for tag in one.tags} >= {"training", "validation"}
    untested = [run for run in runs if "test_accuracy" not in tracking.read(run).metrics]
    assert len(untested) >= 3
    for run_id in untested:
        inputs = tracking.client.get_run(run_id).inputs.dataset_inputs
        assert "test" not in {tag.value for one in inputs for tag in one.tags}


def test_a_dataset_that_another_process_logs_at_the_same_moment_is_logged_all_the_same(
    tracking, monkeypatch
) -> None:
    run_id = tracking.start(tracking.experiment("x"), "train", "x", {}, {})
    real, calls = tracking.client.log_inputs, []

    def colliding(*args):
        calls.append(args)
        if len(calls) < 3:
            raise MlflowException(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id"
            )
        return real(*args)

    monkeypatch.setattr(tracking.client, "log_inputs", colliding)
    tracking.log_dataset(run_id, "digits", "training", "0" * 64, {"samples": 3})
    assert len(calls) == 3
    assert [i.dataset.name for i in tracking.client.get_run(run_id).inputs.dataset_inputs] == [
        "digits-training"
    ]


def test_the_teacher_has_one_run_of_its_own_with_its_accuracy(finished) -> None:
    sweep, _, tracking, _, _ = finished
    (teacher,) = tracking.find("teacher", {})
    assert 0 < teacher.metrics["val_accuracy"] <= 1
    assert len(tracking.history(teacher.run_id, "epoch/val_accuracy")) == 3
    for run in tracking.find("trial", {"kdexp.study": sweep.name}):
        assert run.tags["kdexp.teacher_run"] == teacher.run_id
        assert run.metrics["teacher_val_accuracy"] == teacher.metrics["val_accuracy"]


def test_the_same_command_on_a_finished_study_trains_nothing(finished) -> None:
    sweep, settings, tracking, _, _ = finished
    events, _ = drain(run_sweep(sweep, settings, tracking, CPU))
    assert not [event for event in events if isinstance(event, TrialStarted)]


def test_another_search_space_under_the_same_name_is_refused(finished) -> None:
    sweep, settings, tracking, _, _ = finished
    other = sweep.model_copy(update={"training": sweep.training.model_copy(update={"epochs": 9})})
    with pytest.raises(StudyError, match="training.epochs 3 → 9"):
        drain(run_sweep(other, settings, tracking, CPU))


def test_selection_looks_at_test_once_registers_and_can_be_loaded(finished) -> None:
    import mlflow

    sweep, settings, tracking, _, _ = finished
    study = tracking.study(sweep.name)
    first = promote(study, sweep.selection, settings, tracking, CPU)
    again = promote(study, sweep.selection, settings, tracking, CPU)
    assert (first.new_look, again.new_look) == (True, False)
    assert (
        first.candidate
        == again.candidate
        == min(
            (
                c
                for c in candidates(study, tracking)
                if c.val_accuracy >= sweep.selection.accuracy_bar
            ),
            key=lambda c: (c.parameters, -c.val_accuracy),
        )
    )
    assert again.test_accuracy == first.test_accuracy
    tested = [
        run
        for run in tracking.find("trial", {"kdexp.study": sweep.name})
        if "test_accuracy" in run.metrics
    ]
    assert [run.run_id for run in tested] == [first.candidate.run_id]
    assert len(tracking.history(first.candidate.run_id, "test_accuracy")) == 1
    assert tested[0].tags["kdexp.selected"] == "smallest"
    versions = tracking.client.search_model_versions(f"name='{sweep.name}'")
    assert [v.run_id for v in versions] == [first.candidate.run_id]
    model = mlflow.pyfunc.load_model(
        tracking.client.get_model_version_by_alias(sweep.name, "smallest").source
    )
    test = load_test(sweep.data)
    answers = model.predict(test.images.numpy())
    right = [test.classes[label] for label in test.labels] == answers.label
    assert right.mean() == pytest.approx(first.test_accuracy)
    assert ((answers.probability >= 0.1) & (answers.probability <= 1)).all()
    assert first.model == "models:/tiny@smallest"


def test_any_optuna_tool_shows_what_each_trial_came_to(finished) -> None:
    sweep, settings, tracking, _, _ = finished
    study = optuna.load_study(study_name=sweep.name, storage=settings.storage_url)
    assert study.metric_names == ["val_accuracy"]
    runs = {int(run.tags["kdexp.trial"]): run for run in tracking.find("trial", {})}
    for trial in study.trials:
        metrics = runs[trial.number].metrics
        assert trial.user_attrs["val_accuracy"] == metrics["val_accuracy"] == trial.value
        assert trial.user_attrs["parameters"] == metrics["parameters"]
    assert "user_attrs_parameters" in study.trials_dataframe().columns


def test_the_study_knows_what_distillation_gained(finished) -> None:
    sweep, _, tracking, _, _ = finished
    trials = candidates(tracking.study(sweep.name), tracking)
    found = gain(tracking.find("trial", {}))
    assert found.differences == (trials[0].val_accuracy - trials[1].val_accuracy,)
    assert "one seed each" in str(found)
    assert sweep_of(tracking.study(sweep.name), tracking) == sweep


def test_a_bar_nobody_reaches_names_the_nearest_miss(finished) -> None:
    sweep, settings, tracking, _, _ = finished
    with pytest.raises(
        NothingPasses, match=r"No student of study 'tiny' reaches validation accuracy 1\. Best: 0\."
    ):
        promote(tracking.study(sweep.name), Selection(accuracy_bar=1.0), settings, tracking, CPU)


def test_a_run_is_reproduced_bit_for_bit_from_its_own_record(finished, tmp_path) -> None:
    sweep, settings, tracking, _, _ = finished
    run = tracking.find("trial", {"kdexp.study": sweep.name})[2]
    # the teacher comes out of the run's record, not out of a cache
    shutil.rmtree(settings.teachers)
    _, comparison = drain(reproduce(run.run_id, settings, tracking, CPU))
    assert comparison.identical
    assert comparison.compared == 18
    assert comparison.again.tags["kdexp.reproduces"] == run.run_id
    assert tracking.read(comparison.again.run_id).tags["kdexp.reproduction"] == "identical"
    assert len(candidates(tracking.study(sweep.name), tracking)) == 4, "a reproduction is no trial"


def test_a_run_under_an_ensemble_is_reproduced_from_its_own_record(
    tiny: Sweep, settings, tracking
) -> None:
    drain(
        run_sweep(tiny.replace({"teacher.members": 2, "study.trials": 1}), settings, tracking, CPU)
    )
    (teacher,) = tracking.find("teacher", {})
    assert teacher.name == "teacher · 2 x cnn 8-16/16"
    (run,) = tracking.find("trial", {"kdexp.study": "tiny"})
    shutil.rmtree(settings.teachers)
    events, comparison = drain(reproduce(run.run_id, settings, tracking, CPU))
    assert sum(isinstance(event, EpochReport) for event in events) == tiny.training.epochs, (
        "the teacher is not trained again"
    )
    assert comparison.identical
    assert run.tags["kdexp.teacher_sha256"] == teacher.tags["kdexp.weights_sha256"]


def test_what_differs_is_named(finished, monkeypatch) -> None:
    sweep, settings, tracking, _, _ = finished
    run = tracking.find("trial", {"kdexp.study": sweep.name})[0]
    monkeypatch.setattr(
        "kdexp.distill.packs.seed_of", lambda seed, *purpose: seed_of(seed + 1, *purpose)
    )
    _, comparison = drain(reproduce(run.run_id, settings, tracking, CPU))
    assert not comparison.identical
    assert {d.what for d in comparison.differences} >= {"student weights", "loss, epoch 1"}


@pytest.mark.parametrize("which", ["unknown", "study", "teacher"])
def test_what_cannot_be_reproduced_is_said(finished, which) -> None:
    sweep, settings, tracking, _, _ = finished
    run_id = {
        "unknown": "0" * 32,
        "study": tracking.study(sweep.name).run_id,
        "teacher": tracking.find("teacher", {})[0].run_id,
    }[which]
    says = {
        "unknown": "No run '0000",
        "study": "is a whole study; reproduce one of its trials",
        "teacher": "is a teacher",
    }[which]
    with pytest.raises(KdexpError, match=says):
        drain(reproduce(run_id, settings, tracking, CPU))


def test_an_unknown_study_names_those_there_are(finished) -> None:
    _, _, tracking, _, _ = finished
    with pytest.raises(
        TrackingError, match=r"No study 'tinny' in the embedded store. Studies there: tiny"
    ):
        tracking.study("tinny")


# --- interruption ---


def interrupt_at(generator, stop) -> list:
    events = []
    for event in generator:
        events.append(event)
        if stop(event):
            generator.close()
            break
    return events


@pytest.mark.parametrize("number", [0, 2])
def test_an_interrupted_study_continues_without_repeating_or_losing_a_trial(
    tiny: Sweep, settings, tracking, number
) -> None:
    first = interrupt_at(
        run_sweep(tiny, settings, tracking, CPU),
        lambda e: isinstance(e, EpochDone) and (e.number, e.report.epoch) == (number, 2),
    )
    assert statuses(settings, "trial")["RUNNING"] == statuses(settings, "study")["RUNNING"] == 0
    assert statuses(settings, "trial")["KILLED"] == 1
    second, others = drain(run_sweep(tiny, settings, tracking, CPU))
    assert others == 0
    done = [e.number for e in first + second if isinstance(e, TrialFinished)]
    assert sorted(done) == [0, 1, 2, 3]
    again = [(e.number, e.epoch) for e in second if isinstance(e, TrialStarted) and e.retried]
    assert again == [(number, 1)], "it goes on from its checkpoint"
    study = optuna.load_study(study_name="tiny", storage=settings.storage_url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert statuses(settings, "trial") == {"FINISHED": 4}, "in the run that it had"


def test_an_interrupted_study_ends_like_an_unbroken_one(
    tiny: Sweep, settings, tracking, finished
) -> None:
    interrupt_at(
        run_sweep(tiny, settings, tracking, CPU),
        lambda e: isinstance(e, EpochDone) and e.number == 2,
    )
    drain(run_sweep(tiny, settings, tracking, CPU))
    broken = optuna.load_study(study_name="tiny", storage=settings.storage_url).trials
    unbroken = study_of(finished).trials
    assert [(t.params, t.value) for t in broken] == [(t.params, t.value) for t in unbroken]


def test_a_trial_whose_run_was_closed_but_never_told_is_told_not_trained_again(
    tiny: Sweep, settings, tracking, monkeypatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OpenStudy, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            drain(run_sweep(tiny, settings, tracking, CPU))
    events, _ = drain(run_sweep(tiny, settings, tracking, CPU))
    assert sorted(e.number for e in events if isinstance(e, TrialStarted)) == [1, 2, 3]
    assert statuses(settings, "trial") == {"FINISHED": 4}


def test_a_larger_budget_continues_a_finished_study(tiny: Sweep, settings, tracking) -> None:
    small = tiny.model_copy(update={"study": tiny.study.model_copy(update={"trials": 2})})
    drain(run_sweep(small, settings, tracking, CPU))
    events, _ = drain(run_sweep(tiny, settings, tracking, CPU))
    assert [e.number for e in events if isinstance(e, TrialFinished)] == [2, 3]


def test_a_failing_trial_closes_its_run_and_stays_for_the_next_time(
    tiny: Sweep, settings, tracking, monkeypatch
) -> None:
    def failing(*_: object):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kdexp.runs.recording.save_file", failing)
        with pytest.raises(OSError, match="No space left"):
            drain(run_sweep(tiny, settings, tracking, CPU))
    assert statuses(settings, "trial") == {"FAILED": 1}
    events, _ = drain(run_sweep(tiny, settings, tracking, CPU))
    assert sorted(e.number for e in events if isinstance(e, TrialFinished)) == [0, 1, 2, 3]


# --- pruning, divergence, other searches ---


# which learns from nothing else
@pytest.mark.parametrize(("sampler", "told"), [("tpe", "PRUNED"), ("gp", "COMPLETE")])
def test_a_pruned_trial_is_recorded_as_pruned_and_still_reproduces(
    tiny: Sweep, settings, tracking, monkeypatch, sampler: str, told: str
) -> None:
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number >= 2)
    study = tiny.study.model_copy(update={"pruner": "median", "sampler": sampler})
    events, _ = drain(run_sweep(tiny.model_copy(update={"study": study}), settings, tracking, CPU))
    monkeypatch.undo()
    states = [e.outcome.state for e in events if isinstance(e, TrialFinished)]
    assert states == ["complete", "complete", "pruned", "pruned"]
    study = optuna.load_study(study_name="tiny", storage=settings.storage_url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", told, told]
    assert [trial.user_attrs.get("ended") for trial in study.trials] == [
        None,
        None,
        "pruned",
        "pruned",
    ]
    run = tracking.find("trial", {"kdexp.state": "pruned"})[0]
    assert run.metrics["epochs_trained"] == 1
    assert drain(reproduce(run.run_id, settings, tracking, CPU))[1].identical


@pytest.mark.parametrize("pruner", ["median", "hyperband", "successive_halving"])
@pytest.mark.parametrize("sampler", ["random", "gp"])
def test_every_sampler_and_pruner_runs(tiny: Sweep, settings, tracking, sampler, pruner) -> None:
    study = tiny.study.model_copy(update={"sampler": sampler, "pruner": pruner})
    events, _ = drain(run_sweep(tiny.model_copy(update={"study": study}), settings, tracking, CPU))
    assert [e.number for e in events if isinstance(e, TrialFinished)] == [0, 1, 2, 3]


def test_a_diverged_trial_ends_and_the_study_goes_on(tiny: Sweep, settings, tracking) -> None:
    wild = tiny.model_copy(
        update={
            "training": tiny.training.model_copy(
                update={"optimizer": "sgd", "learning_rate": 1e30, "schedule": "constant"}
            ),
            "search": {
                path: d for path, d in tiny.search.items() if path != "training.learning_rate"
            },
        }
    )
    events, _ = drain(run_sweep(wild, settings, tracking, CPU))
    assert [e.outcome.state for e in events if isinstance(e, TrialFinished)] == ["diverged"] * 4
    assert statuses(settings, "trial") == {"FINISHED": 4}
    with pytest.raises(NothingPasses):
        promote(tracking.study("tiny"), wild.selection, settings, tracking, CPU)


@pytest.mark.parametrize(
    ("alpha", "search"),
    [
        (0.3, {"low": 0.2, "high": 0.9}),
        (0.3, None),
        (0.0, {"low": 0.0, "high": 0.9}),
        (1.0, {"choices": [1, 0.5]}),
        (0.0, {"choices": [0, 1]}),
    ],
)
def test_both_controls_are_trained_whatever_is_searched(
    tiny: Sweep, settings, tracking, alpha, search
) -> None:
    tree = json.loads(tiny.model_dump_json())
    tree["study"]["trials"] = 2
    tree["distillation"]["alpha"] = alpha
    del tree["search"]["distillation.alpha"]
    # whole numbers for a key that is none
    tree["search"]["distillation.temperature"] = {"choices": [1, 5]}
    if search:
        tree["search"]["distillation.alpha"] = search
    events, _ = drain(
        run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU)
    )
    assert [e.recipe.distillation.alpha for e in events if isinstance(e, TrialStarted)] == [
        alpha,
        0.0,
    ]
    assert [run.name for run in tracking.find("trial", {})] == [
        "trial 0 · documented defaults",
        "trial 1 · labels only",
    ]


def test_stopping_while_the_teacher_is_trained_leaves_no_run_and_no_study(
    tiny: Sweep, settings, tracking
) -> None:
    interrupt_at(run_sweep(tiny, settings, tracking, CPU), lambda event: True)
    assert (
        statuses(settings, "study")
        == statuses(settings, "trial")
        == statuses(settings, "teacher")
        == {}
    )
    corrected = tiny.replace({"training.epochs": 2})
    events, _ = drain(run_sweep(corrected, settings, tracking, CPU))
    assert sorted(e.number for e in events if isinstance(e, TrialFinished)) == [0, 1, 2, 3]


def test_a_study_does_not_go_on_with_another_teacher(
    tiny: Sweep, settings, tracking, tmp_path
) -> None:
    _, prepared = drain(
        prepare(tiny.recipe, Bench(settings, tracking, CPU, tracking.experiment("x")))
    )
    checkpoint = tmp_path / "teacher.safetensors"
    shutil.copy(prepared.teacher.weights, checkpoint)
    given = tiny.replace({"teacher.weights": str(checkpoint)})
    drain(run_sweep(given, settings, tracking, CPU))
    state = load_file(checkpoint)
    state["0.weight"] += 0.01
    save_file(state, checkpoint)
    with pytest.raises(StudyError, match="Study 'tiny' has trials with another teacher"):
        drain(run_sweep(given, settings, tracking, CPU))
    assert statuses(settings, "study")["RUNNING"] == 0


def test_a_network_that_cannot_be_exported_is_selected_all_the_same(
    tiny: Sweep, settings, tracking, monkeypatch
) -> None:
    drain(run_sweep(tiny, settings, tracking, CPU))

    def refusing(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(torch.export, "export", refusing)
    done = promote(
        tracking.study(tiny.name),
        Selection(accuracy_bar=0.0, goal="most_accurate"),
        settings,
        tracking,
        CPU,
    )
    assert done.test_accuracy > 0
    tags = tracking.read(done.candidate.run_id).tags
    assert tags["kdexp.selected"] == "most_accurate"
    assert tags["kdexp.not_registered"] == "data-dependent control flow"
    assert not done.model


def test_an_empty_search_is_refused_before_any_work(tiny: Sweep, settings, tracking) -> None:
    with pytest.raises(StudyError, match="search of 'tiny' is empty"):
        drain(run_sweep(tiny.model_copy(update={"search": {}}), settings, tracking, CPU))
    assert not settings.teachers.exists()


def test_a_student_that_cannot_be_built_is_found_before_any_trial(
    tiny: Sweep, settings, tracking
) -> None:
    tree = json.loads(tiny.model_dump_json())
    tree["search"]["student.channels"] = {"choices": [[4, 8], [1, 1, 1, 1, 1]]}
    with pytest.raises(Exception, match="halvings leave nothing"):
        drain(run_sweep(Sweep.model_validate_json(json.dumps(tree)), settings, tracking, CPU))
    assert statuses(settings, "trial") == {}


def test_a_run_that_fails_is_closed_with_its_reason(tiny: Sweep, settings, tracking) -> None:
    bench = Bench(settings, tracking, CPU, tracking.experiment("x"))
    _, prepared = drain(prepare(tiny.recipe, bench))
    with (
        pytest.raises(RuntimeError, match="boom"),
        recorded(tiny.recipe, prepared, bench, Entry("train", "x")) as running,
    ):
        raise RuntimeError("boom")
    run = tracking.read(running.run_id)
    assert (run.status, run.tags["kdexp.error"]) == ("FAILED", "boom")


def test_no_store_of_a_study_holds_a_test_figure_before_selection(
    tiny: Sweep, settings, tracking, monkeypatch
) -> None:
    """Nothing in a search may see the test split: loading it would fail here, and no metric speaks
    of it.
    """

    def forbidden(*_: object) -> None:
        raise AssertionError("the search asked for the test split")

    read = data_module._train_and_test
    monkeypatch.setattr(
        data_module,
        "_train_and_test",
        lambda *args, test: forbidden() if test else read(*args, test=test),
    )
    drain(run_sweep(tiny, settings, tracking, CPU))
    assert not rows(settings, "select * from metrics where key like 'test%'")
    assert not list(Path(settings.stores).rglob("*test*"))


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ({"channels": (4, 8), "hidden": 16}, "cnn 4-8/16"),
        ({"channels": (4, 8), "hidden": 0}, "cnn 4-8"),
        ({"architecture": "residual", "channels": (4, 8)}, "residual 4-8"),
        ({"architecture": "resnet18"}, "resnet18"),
    ],
)
def test_a_network_is_named_by_its_family_and_channels(network: dict, name: str) -> None:
    assert named(Student(**network)) == name


def test_a_trial_that_has_become_another_commands_costs_the_trial_alone(
    settings, tracking, tiny
) -> None:
    sweep = run_sweep(tiny, settings, tracking, CPU)
    next(event for event in sweep if isinstance(event, EpochDone))
    with closing(sqlite3.connect(settings.stores / "optuna.db", isolation_level=None)) as optuna_db:
        optuna_db.execute(
            "update kdexp_claims set token = token + 1, claimant = 'somebody@elsewhere'"
        )
    events, others = drain(sweep)
    assert [event.number for event in events if isinstance(event, TrialTaken)] == [0]
    assert others == 1
    trials = optuna.load_study(study_name=tiny.name, storage=settings.storage_url).trials
    assert [trial.state.name for trial in trials] == ["RUNNING"] + ["COMPLETE"] * 3, (
        "it is left to that one"
    )
    assert statuses(settings, "trial") == Counter(KILLED=1, FINISHED=3)


@pytest.mark.parametrize(
    ("stop", "left"),
    [(KeyboardInterrupt, "released"), (KdexpError, "released"), (ValueError, "failed")],
)
def test_what_stops_between_a_choice_and_its_run_leaves_the_trial_to_the_next(
    settings, tracking, tiny, monkeypatch, stop, left
) -> None:
    def fail(*_: object) -> None:
        raise stop("it is out of memory")

    monkeypatch.setattr("kdexp.search.scheduler.choose", fail)
    sweep = run_sweep(tiny, settings, tracking, CPU)
    if stop is ValueError:
        failed = next(event for event in sweep if isinstance(event, TrialFailed))
        assert (failed.number, "it is out of memory" in failed.why) == (0, True)
        sweep.close()
    else:
        with pytest.raises(stop):
            drain(sweep)
    with closing(sqlite3.connect(settings.stores / "optuna.db")) as optuna_db:
        assert optuna_db.execute("select handed_back from kdexp_claims").fetchall() == [(left,)]
    monkeypatch.undo()
    events, _ = drain(run_sweep(tiny, settings, tracking, CPU))
    assert [event.number for event in events if isinstance(event, TrialFinished)] == [0, 1, 2, 3]


def test_the_run_of_a_study_in_another_storage_is_left_alone(settings, tracking, tiny) -> None:
    """Two commands share MLflow, not Optuna's storage, and start together: each has a study of its
    own.
    """
    study = partial(_new_parent_run, tiny, tracking, tracking.experiment(tiny.name))
    own, others = study("own mark"), study("another's mark")
    assert own != others
    assert study("own mark") == own, "made by a process that died before Optuna was told"


def test_a_run_of_another_version_is_said_to_be_one(settings, tracking, tiny) -> None:
    run_id = tracking.start(tracking.experiment("old"), "trial", "trial 0", {}, {})
    tracking.log_text(
        run_id, "config.json", json.dumps(tiny.recipe.model_dump(mode="json") | {"pupil": {}})
    )
    with pytest.raises(
        ConfigError, match=f"run {run_id}, recorded by another version of kdexp: pupil: unknown key"
    ):
        recipe_of(tracking.read(run_id), tracking)
