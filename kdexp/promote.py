"""From a study to its model: apply the selection rule, look at the test split once, register the model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from kdexp import KdexpError
from kdexp.config import Recipe, Selection, Sweep, recorded
from kdexp.distill.data import Split, load_splits, load_test
from kdexp.distill.evaluate import evaluate
from kdexp.distill.models import FromPixels, build
from kdexp.plots import frontier
from kdexp.selection import Candidate, select
from kdexp.settings import Settings
from kdexp.tracking import RunRecord, Tracking

__all__ = ["Promotion", "candidates", "gain", "promote", "sweep_of"]


@dataclass(frozen=True)
class Promotion:
    """The selected model and its one look at the test split."""

    candidate: Candidate
    rule: Selection
    val_interval: tuple[float, float]
    test_accuracy: float
    test_interval: tuple[float, float]
    test_samples: int
    new_look: bool
    """False where this model had been looked at before: the number is the one recorded then."""
    looks: int
    """How many models of this study have been looked at on test."""
    model: str
    """Where MLflow loads it from: models:/name@alias; empty where the network cannot be exported."""


def promote(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking, device: torch.device) -> Promotion:
    """Select by `rule`, evaluate the selected model, and only it, on test, and register it.

    A model is looked at once: its recorded test accuracy is used from then on. Raises NothingPasses.
    """
    settings.stores.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.stores / ".promote.lock"):  # two workers that finish together look at test once
        return _promote(study, rule, settings, tracking, device)


def _promote(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking, device: torch.device) -> Promotion:
    trials = candidates(study, tracking)
    chosen = select(trials, rule, study.tags["kdexp.study"])
    run = tracking.read(chosen.run_id)
    recipe = recipe_of(run, tracking)
    new_look = "test_accuracy" not in run.metrics
    if new_look:
        _look_at_test(run, recipe, study, settings, tracking, device)
        run = tracking.read(chosen.run_id)
    model = _register(run, recipe, study, rule, settings, tracking)
    for other in tracking.find("trial", {"kdexp.study": study.tags["kdexp.study"], "kdexp.selected": rule.goal}):
        if other.run_id != chosen.run_id:
            tracking.tag(other.run_id, {"kdexp.selected": ""})
    tracking.tag(chosen.run_id, {"kdexp.selected": rule.goal})
    looks = sum("test_accuracy" in trial.metrics for trial in _trials(study, tracking))
    promotion = Promotion(
        candidate=chosen,
        rule=rule,
        val_interval=(run.metrics["val_accuracy_low"], run.metrics["val_accuracy_high"]),
        test_accuracy=run.metrics["test_accuracy"],
        test_interval=(run.metrics["test_accuracy_low"], run.metrics["test_accuracy_high"]),
        test_samples=int(run.metrics["test_samples"]),
        new_look=new_look,
        looks=looks,
        model=model,
    )
    _report_on_study(study, trials, promotion, tracking)
    return promotion


def candidates(study: RunRecord, tracking: Tracking) -> list[Candidate]:
    """Every trial of a study that ended with weights, by trial number."""
    return [
        Candidate(
            run_id=run.run_id,
            trial=int(run.tags["kdexp.trial"]),
            parameters=int(run.metrics["parameters"]),
            multiply_adds=int(run.metrics["multiply_adds"]),
            bytes=int(run.metrics["model_bytes"]),
            val_accuracy=run.metrics["val_accuracy"],
        )
        for run in _trials(study, tracking)
        if run.tags.get("kdexp.weights_sha256")
    ]


def gain(trials: Sequence[Candidate]) -> float | None:
    """What distillation gained: validation accuracy of trial 0 (defaults) over trial 1 (labels only)."""
    accuracy = {trial.trial: trial.val_accuracy for trial in trials}
    return accuracy[0] - accuracy[1] if 0 in accuracy and 1 in accuracy else None


def sweep_of(study: RunRecord, tracking: Tracking) -> Sweep:
    """The sweep file a study was last run with."""
    with tempfile.TemporaryDirectory() as temporary:
        file = tracking.download(study.run_id, "sweep.json", Path(temporary))
        return recorded(file.read_text(), f"study '{study.tags['kdexp.study']}', made by another version of kdexp")


def load_student(run: RunRecord, recipe: Recipe, like: Split, tracking: Tracking) -> nn.Module:
    """The student of a finished run, whose recipe this is, with its recorded weights."""
    module = build(recipe.student, like)
    with tempfile.TemporaryDirectory() as temporary:
        module.load_state_dict(load_file(tracking.download(run.run_id, "weights.safetensors", Path(temporary))))
    return module.eval()


def recipe_of(run: RunRecord, tracking: Tracking) -> Recipe:
    """The recipe of a run, from its record alone."""
    with tempfile.TemporaryDirectory() as temporary:
        return Recipe.model_validate_json(tracking.download(run.run_id, "config.json", Path(temporary)).read_text())


def _trials(study: RunRecord, tracking: Tracking) -> list[RunRecord]:
    runs = tracking.find("trial", {"mlflow.parentRunId": study.run_id})
    ended = [run for run in runs if run.status == "FINISHED" and "val_accuracy" in run.metrics]
    return sorted(ended, key=lambda run: int(run.tags["kdexp.trial"]))


def _look_at_test(
    run: RunRecord, recipe: Recipe, study: RunRecord, settings: Settings, tracking: Tracking, device: torch.device
) -> None:
    test = load_test(recipe.data, settings.data_dir, device)
    module = load_student(run, recipe, test, tracking).to(device)
    result = evaluate(module, test)
    low, high = result.interval
    tracking.log_dataset(run.run_id, recipe.data.dataset, "test", test.fingerprint, {"samples": len(test)})
    tracking.log_metrics(
        run.run_id,
        {
            "test_accuracy": result.accuracy,
            "test_accuracy_low": low,
            "test_accuracy_high": high,
            "test_loss": result.loss,
            "test_samples": result.samples,
        },
    )
    note = (
        f"**Selected** by study *{study.tags['kdexp.study']}*. Test accuracy **{result.accuracy:.2%}** (95 % interval "
        f"{low:.2%} to {high:.2%}, {result.samples:,} images, looked at once).\n\n{run.tags['mlflow.note.content']}"
    )
    tracking.tag(run.run_id, {"kdexp.test_looked_at": datetime.now(UTC).isoformat("T", "seconds"), "mlflow.note.content": note})


def _register(run: RunRecord, recipe: Recipe, study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking) -> str:
    """Register the run's student (once) and point the alias to it; the address MLflow loads it from."""
    name, alias = study.tags["kdexp.study"], rule.goal.replace("_", "-")
    version = run.tags.get("kdexp.model_version")
    if version:
        tracking.alias(name, alias, version)
    else:
        try:
            _log_model(run, recipe, settings, tracking)
        except KdexpError:
            raise
        except Exception as error:  # torch.export refuses some networks, each in its own way
            tracking.tag(run.run_id, {"kdexp.not_registered": str(error)[:500]})
            return ""
        text = (
            f"Validation accuracy {run.metrics['val_accuracy']:.2%}, test accuracy {run.metrics['test_accuracy']:.2%}, "
            f"{int(run.metrics['parameters']):,} parameters. Takes pixels 0 to 255 as float32, gives logits."
        )
        version = tracking.register(run.run_id, name, alias, text)
        tracking.tag(run.run_id, {"kdexp.model_version": version})
    return f"models:/{name}@{alias}"


def _log_model(run: RunRecord, recipe: Recipe, settings: Settings, tracking: Tracking) -> None:
    like = load_splits(recipe.data, settings.data_dir).train.take(torch.arange(2))  # what the network's input is like
    module = FromPixels(load_student(run, recipe, like, tracking), like).eval()
    example = like.images.float().expand(-1, like.channels, -1, -1).contiguous()
    tracking.log_model(run.run_id, module, example)


def _report_on_study(study: RunRecord, trials: Sequence[Candidate], done: Promotion, tracking: Tracking) -> None:
    chosen, (low, high) = done.candidate, done.test_interval
    lines = [
        f"**Selected: trial {chosen.trial}**, run `{chosen.run_id}`: {chosen.parameters:,} parameters, "
        f"{chosen.val_accuracy:.2%} on validation, **{done.test_accuracy:.2%}** on test (95 % interval {low:.2%} to "
        f"{high:.2%}, {done.test_samples:,} images).",
        "",
        f"Rule: {done.rule.goal.replace('_', ' ')} by {done.rule.size.replace('_', '-')}, validation accuracy at least "
        f'{done.rule.accuracy_bar:.2%}. Load it: `mlflow.pytorch.load_model("{done.model}")`. '
        f"Train it again: `kdexp reproduce {chosen.run_id}`.",
        "",
        "| trial | parameters | validation accuracy | run |",
        "|---|---|---|---|",
        *(
            f"| {c.trial}{' ← selected' if c == chosen else ''} | {c.parameters:,} | {c.val_accuracy:.2%} | `{c.run_id}` |"
            for c in trials
        ),
    ]
    tracking.tag(study.run_id, {"mlflow.note.content": "\n".join(lines)[:8000], "kdexp.selected_run": chosen.run_id})
    metrics = {"trials": len(trials), "selected_parameters": chosen.parameters, "selected_val_accuracy": chosen.val_accuracy}
    gained = gain(trials)
    tracking.log_metrics(study.run_id, metrics | ({"distillation_gain": gained} if gained is not None else {}))
    with tempfile.TemporaryDirectory() as temporary:
        frontier(trials, done.rule, chosen).savefig(Path(temporary) / "frontier.png", dpi=110)
        tracking.log_files(study.run_id, Path(temporary))
