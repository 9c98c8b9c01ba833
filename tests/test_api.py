"""kdexp from Python and for programs: the same study as data frames, as JSON, as rows on a screen."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, ROOT, drain, stores_in, tiny_sweep
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

import kdexp
from kdexp import KdexpError, api, as_json
from kdexp.config import Selection
from kdexp.distill.evaluate import logits_of
from kdexp.runs.records import load_student, recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.screen import show_studies, show_trials
from kdexp.select.benchmark import benchmark
from kdexp.select.confirm import confirm
from kdexp.select.export import export
from kdexp.select.listing import TrialRow, frontier, studies_there, trials_of
from kdexp.select.variants import splits_of
from kdexp.settings import Settings


@pytest.fixture(scope="module")
def stores(tmp_path_factory, empty_store) -> Path:
    return stores_in(tmp_path_factory.mktemp("api"), empty_store).stores


@pytest.fixture(scope="module")
def study(stores) -> kdexp.Study:
    """The tiny study, run from Python."""
    return kdexp.run_sweep(tiny_sweep(), stores=stores, device="cpu", workers=1, threads=1)


def shown(show, rows) -> str:
    console = Console(file=StringIO(), width=60, soft_wrap=True)
    show(console, rows)
    return console.file.getvalue()


def row(trial: int, parameters: int | None, accuracy: float | None, **more) -> TrialRow:
    sizes = (parameters, 10 * (parameters or 0), 4 * (parameters or 0), None)
    state = "complete" if accuracy is not None else "running"
    return TrialRow(
        **{"trial": trial, "repeats": None, "fold": 0, "state": state}
        | dict(
            zip(("parameters", "multiply_adds", "bytes", "activation_bytes"), sizes, strict=True)
        )
        | {"val_accuracy": accuracy, "val_low": None, "val_high": None, "test_accuracy": None}
        | {"standing": "", "passes": False, "run_id": f"r{trial}"}
        | more
    )


def test_the_frontier_holds_what_nothing_else_is_better_than() -> None:
    rows = [
        row(0, 100, 0.90),
        row(1, 100, 0.90),  # the same, later
        row(2, 50, 0.85),
        row(3, 60, 0.85),  # larger, no better
        row(4, 200, 0.95),
        row(5, 40, 0.99, repeats=2),  # no recipe of its own
        row(6, 30, 0.99, state="pruned"),
        row(7, None, None),
    ]
    assert [each.trial for each in frontier(rows)] == [2, 0, 4]
    assert frontier(rows, "activation_bytes") == []
    assert frontier([]) == []


def test_a_study_as_data_frames(study) -> None:
    trials = study.trials
    assert list(trials.trial) == [0, 1, 2, 3]
    assert {"parameters", "val_accuracy", "run_id", "student.channels"} <= set(trials.columns)
    assert trials["distillation.alpha"][1] == 0
    assert trials["student.channels"][0] == [4, 8]
    assert set(trials.state) == {"complete"}
    front = study.frontier()
    assert front.parameters.is_monotonic_increasing
    assert front.val_accuracy.is_monotonic_increasing
    assert trials.val_accuracy.max() == front.val_accuracy.max()


def test_its_selected_model_is_the_one_that_was_looked_at_on_test(study) -> None:
    selected, trials = study.selected, study.trials
    assert selected is not None
    assert selected.parameters == trials[trials.passes].parameters.min()
    assert list(trials[trials.test_accuracy.notna()].run_id) == [selected.run_id]
    assert study.name == "tiny"
    assert study.sweep == tiny_sweep()


def test_a_study_is_opened_again_and_selected_from_by_another_rule(study, stores) -> None:
    again = kdexp.open_study("tiny", stores=str(stores), device="cpu")
    assert again.trials.equals(study.trials)
    with pytest.raises(KdexpError, match="reaches validation accuracy 1"):
        again.select(accuracy_bar=1.0, limit=1_000_000)
    with pytest.raises(KdexpError, match="no study 'absent'|No study 'absent'"):
        kdexp.open_study("absent", stores=stores)
    with pytest.raises(KdexpError, match="store: not known"):
        kdexp.open_study("tiny", store=stores)


def test_a_model_says_of_files_and_arrays_what_it_says_of_its_data_set(study, tmp_path) -> None:
    run_id = study.selected.run_id
    where = {"stores": study.settings.stores, "device": "cpu"}
    model = kdexp.load_model(run_id, **where)
    tracking = Tracking(study.settings)
    run = tracking.read(run_id)
    recipe = recipe_of(run, tracking)
    validation = splits_of(run, recipe, study.settings).validation
    student = load_student(run, recipe, validation, tracking)
    expected = logits_of(student, validation).double().softmax(1).numpy()
    pixels = validation.images.numpy()
    found = model(pixels)
    assert found.shape == (len(validation), 10)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert model.predict(pixels) == [model.classes[index] for index in expected.argmax(1)]
    assert np.array_equal(model(pixels[:, 0]), found)  # grey, without channels
    assert np.array_equal(model(pixels.transpose(0, 2, 3, 1)), found)  # channels last
    file = tmp_path / "one.png"
    Image.fromarray(pixels[0, 0]).save(file)
    np.testing.assert_allclose(model([file]), expected[:1], atol=1e-6)
    assert model([]).shape == (0, 10)
    assert np.array_equal(kdexp.load_model("models:/tiny@smallest", **where)(pixels), found)


def test_what_a_model_does_not_take_is_said_in_one_line(study, tmp_path) -> None:
    model = kdexp.load_model(study.selected.run_id, stores=study.settings.stores, device="cpu")
    with pytest.raises(KdexpError, match="array of float64; give uint8"):
        model(load_digits().images)
    with pytest.raises(
        KdexpError, match=r"shape \(2, 28, 28\); the model takes \(images, 1, 8, 8\)"
    ):
        model(np.zeros((2, 28, 28), np.uint8))
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(KdexpError, match=r"broken\.png"):
        model([tmp_path / "broken.png"])


def test_values_of_a_sweep_file_are_given_as_they_are(tmp_path) -> None:
    sweep = kdexp.load_sweep(
        ROOT / "sweeps" / "digits.yaml", {"study.trials": 3, "student.hidden": 64}
    )
    assert (sweep.study.trials, sweep.student.hidden) == (3, 64)
    with pytest.raises(KdexpError, match="study.trials"):
        kdexp.load_sweep(ROOT / "sweeps" / "digits.yaml", {"study.trials": 0})


def test_the_names_of_the_api_come_with_their_first_use() -> None:
    assert set(api.__all__) == set(kdexp.__all__) - {"KdexpError", "__version__"}
    assert kdexp.load_model is api.load_model
    with pytest.raises(AttributeError):
        kdexp.absent  # noqa: B018


@pytest.mark.slow
def test_a_script_needs_no_guard_for_its_workers(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import kdexp\nprint('begun')\n"
        f"sweep = kdexp.load_sweep({str(ROOT / 'sweeps' / 'digits.yaml')!r},"
        " {'study.trials': 4, 'study.repeats': 1, 'training.epochs': 1, 'teacher.epochs': 1,"
        " 'selection.accuracy_bar': 0.05})\n"
        "print(len(kdexp.run_sweep(sweep, stores='mlruns', workers=2).trials))\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "begun\n4\n"), done.stderr


# --- for programs and on the screen ---


def test_every_answer_is_json_without_what_json_cannot_hold(study, tmp_path) -> None:
    tracking, settings = study.tracking, study.settings
    promotion = study.select()
    first = json.loads(as_json.text(promotion))
    assert first["run_id"] == study.selected.run_id
    assert first["test_accuracy"] == study.selected.test_accuracy
    assert first["sure"] is False
    assert first["repeats"] is None
    assert [one["trial"] for one in first["candidates"]] == [0, 1, 2, 3]
    file = export(promotion.run_id, "int8", tmp_path / "x.onnx", settings, tracking)
    assert json.loads(as_json.text(file))["file_bytes"] == (tmp_path / "x.onnx").stat().st_size
    forms = json.loads(as_json.text(benchmark(promotion.run_id, None, settings, tracking)))
    assert [form["variant"] for form in forms["forms"]] == [
        "as trained",
        "float32",
        "float16",
        "int8",
    ]
    assert forms["forms"][0]["over_as_trained"] is None
    rule = Selection(accuracy_bar=0.1)
    _, done = drain(confirm(study.record, rule, 2, False, settings, tracking, CPU))
    found = json.loads(as_json.text(done))
    assert found["confirmed"] is True
    assert len(found["run_ids"]) == len(found["val"]["accuracies"])
    with pytest.raises(TypeError):
        as_json.text(object())


def test_the_list_shows_studies_and_trials_whole(study) -> None:
    tracking = study.tracking
    (one,) = studies_there(tracking)
    assert (one.study, one.trials) == ("tiny", 4)
    assert one.selected_run == study.selected.run_id
    assert one.run_id in shown(show_studies, [one])
    rows = trials_of(study.record, tracking)
    lines = shown(show_trials, rows).splitlines()
    assert len(lines) == 5
    assert all(any(each.run_id in line for line in lines) for each in rows)
    assert json.loads(as_json.text(rows))[2]["searched"].keys() == tiny_sweep().search.keys()


def test_a_trial_that_has_not_ended_has_no_accuracy(study) -> None:
    tracking = study.tracking
    run_id = tracking.start(
        study.record.experiment_id,
        "trial",
        "trial 9",
        params={"distillation.alpha": 0.5},
        tags={"kdexp.trial": "9", "mlflow.parentRunId": study.record.run_id},
    )
    try:
        last = trials_of(study.record, tracking)[-1]
        assert (last.trial, last.state, last.parameters, last.val_accuracy) == (
            9,
            "running",
            None,
            None,
        )
        assert "running" in shown(show_trials, [last])
        tags = {"kdexp.trial": "2", "mlflow.parentRunId": study.record.run_id}
        before = tracking.start(
            study.record.experiment_id, "trial", "trial 2", params={}, tags=tags
        )
        tracking.client.set_terminated(before, "KILLED")
        assert [row.state for row in trials_of(study.record, tracking)][:3] == ["complete"] * 3
        tracking.client.delete_run(before)
    finally:
        tracking.client.delete_run(run_id)


def test_without_any_study_the_list_says_how_to_begin(settings: Settings, empty_store) -> None:
    assert "kdexp sweep" in shown(show_studies, studies_there(Tracking(settings)))
    assert shown(show_trials, []) == "No trial of this study has begun.\n"
