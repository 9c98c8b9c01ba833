"""Variants on a real study: the smallest in bytes that passes wins, each is measured once, and any
can be exported.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mlflow
import onnxruntime
import pytest
import torch
from conftest import CPU, ROOT, stores_in, tiny_sweep
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kdexp import KdexpError
from kdexp.config import Selection
from kdexp.distill.datasets import load_splits, load_test
from kdexp.distill.deploy import Deployed, DeployError
from kdexp.distill.evaluate import evaluate
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, recorded
from kdexp.runs.tracking import Tracking
from kdexp.screen import show_promotion
from kdexp.search.sweep import run_sweep
from kdexp.select.export import export
from kdexp.select.promote import candidates, promote
from kdexp.select.variants import contenders, needed
from kdexp.selection import AS_TRAINED, Candidate, NothingPasses, passes, select
from kdexp.settings import Settings


def drained(generator):
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


BYTES = Selection(accuracy_bar=0.2, size="bytes")
VARIANTS = ("float32", "float16", "int8")


# --- the search for the best, on made-up numbers ---


@st.composite
def hopes_and_truth(draw):
    """Candidates at their best, and what measuring makes of each, which may be more than its trial:
    or it cannot be made.
    """
    hopes, truth = [], {}
    for trial in range(draw(st.integers(0, 4))):
        accuracy = draw(st.sampled_from([0.85, 0.9, 0.95]))
        for variant, size in zip((AS_TRAINED, *VARIANTS), (40, 32, 16, 8), strict=True):
            size += draw(st.integers(0, 3))
            itself = Candidate(f"run{trial}", trial, 10, 10, size, accuracy, variant=variant)
            rounded = accuracy + draw(st.sampled_from([-0.03, 0, 0.02]))
            real = replace(itself, bytes=size + draw(st.integers(0, 9)), val_accuracy=rounded)
            hope = itself if variant == AS_TRAINED else replace(itself, val_accuracy=1.0)
            hopes.append(hope)
            truth[hope] = (
                draw(st.sampled_from([real, real, None])) if variant != AS_TRAINED else hope
            )
    return hopes, truth


rules = st.builds(
    Selection,
    accuracy_bar=st.sampled_from([0.8, 0.9, 0.94]),
    size=st.just("bytes"),
    limit=st.none() | st.integers(5, 45),
    goal=st.sampled_from(["smallest", "most_accurate"]),
)


@given(hopes_and_truth(), rules)
def test_measuring_what_is_needed_selects_what_measuring_everything_would(made, rule) -> None:
    hopes, truth = made
    asked = []
    found = needed(hopes, rule, lambda hope: asked.append(hope) or truth[hope])
    everything = [real for real in truth.values() if real is not None]
    if any(passes(real, rule) for real in everything):
        assert select(found, rule) == select(everything, rule)
    else:
        assert not any(passes(real, rule) for real in found)
    assert len(asked) == len(set(asked)), "nothing is measured twice"


def test_where_the_first_one_measured_passes_no_other_is() -> None:
    hopes = [
        Candidate("r", 0, 10, 10, size, 0.9, variant=v)
        for v, size in (("as trained", 40), ("float16", 20), ("int8", 10))
    ]
    assert needed(hopes, BYTES, lambda hope: hope) == [hopes[2]]


# --- a real study ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory, empty_store) -> Path:
    """The store of a study of grey digits on three channels."""
    settings = stores_in(tmp_path_factory.mktemp("variants"), empty_store)
    tracking = Tracking(settings)
    list(
        run_sweep(
            tiny_sweep().replace({"data.channels": 3, "training.epochs": 5}),
            settings,
            tracking,
            CPU,
        )
    )
    return settings.stores / "mlflow.db"


@pytest.fixture
def finished(trained, tmp_path) -> tuple[Settings, Tracking]:
    """That study for each test by itself."""
    shutil.copytree(trained.parent / "artifacts", tmp_path / "artifacts")
    with (
        closing(sqlite3.connect(trained)) as original,
        closing(sqlite3.connect(tmp_path / "mlflow.db")) as copy,
    ):
        original.backup(copy)
    settings = Settings(stores=tmp_path)
    return settings, Tracking(settings)


@pytest.fixture
def measurements(monkeypatch) -> list[str]:
    """Which precisions are converted from now on."""
    from kdexp.select import variants

    done, convert = [], variants.convert
    monkeypatch.setattr(
        variants, "convert", lambda module, train, p: done.append(p) or convert(module, train, p)
    )
    return done


def test_by_bytes_a_variant_is_selected_looked_at_registered_and_measured_once(
    finished, measurements
) -> None:
    settings, tracking = finished
    study = tracking.study("tiny")
    first = promote(study, BYTES, settings, tracking, CPU)
    chosen = first.candidate
    assert measurements == ["int8"], "the smallest passes: no other variant had to be made"
    assert chosen.variant == "int8"
    assert chosen.bytes < min(c.bytes for c in candidates(study, tracking)) / 2
    run = tracking.read(chosen.run_id)
    assert run.metrics["int8/model_bytes"] == chosen.bytes
    assert run.metrics["int8/val_accuracy"] == chosen.val_accuracy
    assert "test_accuracy" not in run.metrics, (
        "it is the variant that was looked at, not the student as trained"
    )
    again = promote(study, BYTES, settings, tracking, CPU)
    assert measurements == ["int8"]
    assert (again.candidate, again.test_accuracy) == (chosen, first.test_accuracy)
    assert (first.new_look, again.new_look, again.looks) == (True, False, 1)
    assert len(tracking.history(chosen.run_id, "int8/test_accuracy")) == 1
    test = load_test(tiny_sweep().data)
    version = tracking.client.get_model_version_by_alias("tiny", "smallest")
    answers = mlflow.pyfunc.load_model(version.source).predict(test.images.numpy())
    right = [test.classes[label] for label in test.labels] == answers.label
    assert right.mean() == pytest.approx(first.test_accuracy)
    assert again.gain == first.gain


def test_the_screen_names_the_variant(finished) -> None:
    settings, tracking = finished
    done = promote(tracking.study("tiny"), BYTES, settings, tracking, CPU)
    console = Console(file=StringIO(), width=80, soft_wrap=True)
    show_promotion(console, done, "http://mlflow")
    text = console.file.getvalue()
    assert f"Selected: trial {done.candidate.trial} as int8, folded" in text
    assert 'mlflow.onnx.load_model("models:/tiny@smallest")' in text
    (row,) = [line for line in text.splitlines() if "selected" in line]
    assert row.split()[:2] == [str(done.candidate.trial), "int8"]
    assert row.split()[-1] == done.candidate.run_id, "whole, in a narrow terminal too"


def test_without_the_libraries_trials_compete_as_trained_and_the_screen_says_what_to_install(
    finished, monkeypatch
) -> None:
    settings, tracking = finished
    for module in ("select.promote", "screen"):
        monkeypatch.setattr(f"kdexp.{module}.available", lambda: False)
    done = promote(tracking.study("tiny"), BYTES, settings, tracking, CPU)
    console = Console(file=StringIO(), width=80, soft_wrap=True)
    show_promotion(console, done, "http://mlflow")
    assert done.candidate.variant == AS_TRAINED
    assert "pip install 'kdexp[export]'" in console.file.getvalue()


def test_of_the_most_accurate_every_variant_within_the_limit_is_measured(
    finished, monkeypatch
) -> None:
    """Also one whose trial is not the best: here rounding gives int8 of the last trial what no
    other has.
    """
    settings, tracking = finished
    trials = candidates(tracking.study("tiny"), tracking)
    luckiest = min(trials, key=lambda trial: trial.val_accuracy)

    def measured(maker, hope):
        if hope.variant == AS_TRAINED:
            return hope
        lucky = (hope.run_id, hope.variant) == (luckiest.run_id, "int8")
        return replace(hope, val_accuracy=0.999 if lucky else 0.1)

    monkeypatch.setattr("kdexp.select.variants._Maker.measured", measured)
    rule = BYTES.model_copy(update={"goal": "most_accurate"})
    chosen = select(contenders(trials, rule, settings, tracking), rule)
    assert (chosen.trial, chosen.variant) == (luckiest.trial, "int8")


def test_by_parameters_trials_are_selected_as_they_were_trained(finished, measurements) -> None:
    settings, tracking = finished
    done = promote(tracking.study("tiny"), Selection(accuracy_bar=0.2), settings, tracking, CPU)
    assert done.candidate.variant == AS_TRAINED
    assert not measurements


def test_the_variants_of_a_trial_that_misses_the_bar_do_not_compete(finished, measurements) -> None:
    settings, tracking = finished
    trials = candidates(tracking.study("tiny"), tracking)
    best = max(trial.val_accuracy for trial in trials)
    rule = BYTES.model_copy(update={"accuracy_bar": best})
    found = contenders(trials, rule, settings, tracking)
    assert {c.trial for c in found if c.variant != AS_TRAINED} <= {
        t.trial for t in trials if t.val_accuracy == best
    }
    over = BYTES.model_copy(update={"accuracy_bar": 1.0})
    assert contenders(trials, over, settings, tracking) == trials
    with pytest.raises(NothingPasses):
        promote(tracking.study("tiny"), over, settings, tracking, CPU)


def test_a_variant_below_the_limit_is_found_where_every_trial_is_above_it(finished) -> None:
    settings, tracking = finished
    smallest = min(c.bytes for c in candidates(tracking.study("tiny"), tracking))
    rule = BYTES.model_copy(update={"limit": smallest // 2, "goal": "most_accurate"})
    done = promote(tracking.study("tiny"), rule, settings, tracking, CPU)
    assert done.candidate.bytes <= smallest // 2


def test_a_network_that_cannot_be_exported_competes_as_it_was_trained(
    finished, monkeypatch
) -> None:
    settings, tracking = finished
    study = tracking.study("tiny")
    trials = candidates(study, tracking)[:1]

    def refusing(*_: object) -> None:
        raise DeployError("This network cannot be exported to ONNX: data-dependent control flow")

    monkeypatch.setattr("kdexp.select.variants.made", refusing)
    assert contenders(trials, BYTES, settings, tracking) == trials
    assert "control flow" in tracking.read(trials[0].run_id).tags["kdexp.not_exported"]


# --- export ---


@pytest.mark.parametrize("precision", VARIANTS)
def test_an_exported_file_runs_and_is_what_was_measured(
    finished, tmp_path, precision, monkeypatch
) -> None:
    settings, tracking = finished
    monkeypatch.setattr(
        "kdexp.distill.datasets.load_test", lambda *_: pytest.fail("export looked at test")
    )
    run = tracking.find("trial", {"kdexp.study": "tiny"})[0]
    done = export(run.run_id, precision, tmp_path / "new" / "student.onnx", settings, tracking)
    assert done.file.stat().st_size == done.file_bytes
    assert [file.name for file in done.file.parent.iterdir()] == ["student.onnx"]
    validation = load_splits(tiny_sweep().data).validation
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"pixels": validation.images.numpy()})[0])
    assert (logits.argmax(1) == validation.labels).sum() == done.validation.correct
    run = tracking.read(run.run_id)
    assert run.metrics[f"{precision}/val_accuracy"] == done.validation.accuracy
    assert (
        run.metrics[f"{precision}/parameters"] == done.size.parameters < run.metrics["parameters"]
    )
    assert done.trained_accuracy == run.metrics["val_accuracy"]
    assert abs(done.validation.accuracy - done.trained_accuracy) < 0.02
    assert evaluate(Deployed(done.file.read_bytes(), validation), validation) == done.validation


def test_a_student_that_was_trained_on_validation_too_is_exported_without_an_accuracy_on_its_record(
    finished, tmp_path
) -> None:
    settings, tracking = finished
    recipe = tiny_sweep().recipe.replace(
        {"data.train_on_validation": True, "training.keep": "last"}
    )
    bench = Bench(settings, tracking, CPU, tracking.experiment("tiny"))
    prepared = drained(prepare(recipe, bench))
    with recorded(recipe, prepared, bench, Entry("train", "both")) as running:
        list(running.epochs())
    done = export(running.run_id, "int8", tmp_path / "x.onnx", settings, tracking)
    assert not done.held_out
    assert abs(done.validation.accuracy - done.trained_accuracy) < 0.02
    metrics = tracking.read(running.run_id).metrics
    assert metrics["int8/model_bytes"] == done.size.bytes
    assert "int8/val_accuracy" not in metrics


def test_what_cannot_be_exported_is_said(finished, tmp_path) -> None:
    settings, tracking = finished
    trial = tracking.find("trial", {"kdexp.study": "tiny"})[0].run_id
    bare = tracking.start(tracking.experiment("tiny"), "train", "bare", {}, {})
    (tmp_path / "file").write_text("")
    cases = {
        "No run '0000": ("0" * 32, None),
        f"is a whole study; export one of its trials: kdexp export {trial[:1]}": (
            tracking.study("tiny").run_id,
            None,
        ),
        "is a teacher; only students": (tracking.find("teacher", {})[0].run_id, None),
        "holds no weights": (bare, None),
        "is a folder; name a file in it": (trial, tmp_path),
        "cannot be written: ": (trial, tmp_path / "file" / "x.onnx"),
    }
    for says, (run_id, output) in cases.items():
        with pytest.raises(KdexpError) as error:
            export(run_id, "int8", output, settings, tracking)
        assert says.removesuffix(trial[:1]) in str(error.value)
        assert "\n" not in str(error.value)


def test_other_images_than_those_of_the_run_are_refused(finished, tmp_path) -> None:
    settings, tracking = finished
    run = tracking.find("trial", {"kdexp.study": "tiny"})[1]
    tracking.tag(run.run_id, {"kdexp.validation_sha256": "0" * 64})
    with pytest.raises(KdexpError, match="was trained on other images"):
        export(run.run_id, "int8", tmp_path / "x.onnx", settings, tracking)


def test_the_command_prints_sizes_and_both_accuracies_or_one_clear_line(finished, tmp_path) -> None:
    settings, tracking = finished
    run_id = tracking.find("trial", {"kdexp.study": "tiny"})[0].run_id

    def kdexp(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "kdexp",
            "export",
            *arguments,
            "--stores",
            str(settings.stores),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    done = kdexp(run_id, "--precision", "int8")
    assert done.returncode == 0, done.stderr
    file = tmp_path / f"{run_id}-int8.onnx"
    assert f"{file.stat().st_size:,} bytes" in done.stdout
    assert "bytes of weights" in done.stdout
    assert "measured by running the file; as trained" in done.stdout
    assert "(any number, 1, 8, 8)" in done.stdout
    assert done.stderr == ""
    for arguments, says in (
        (("nope",), "No run 'nope'"),
        ((run_id, "--precision", "int4"), "'int4'"),
    ):
        failed = kdexp(*arguments)
        assert failed.returncode != 0
        assert says in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
