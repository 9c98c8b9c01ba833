"""From a study to its model: apply the selection rule, look at the test split once, register the model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock

from kdexp import KdexpError
from kdexp.config import Recipe, Selection, Sweep, Variant
from kdexp.distill.data import load_splits, load_test
from kdexp.distill.deploy import available
from kdexp.distill.evaluate import evaluate
from kdexp.distill.models import FromPixels
from kdexp.plots import frontier
from kdexp.records import load_student, recipe_of
from kdexp.selection import AS_TRAINED, Candidate, select
from kdexp.settings import Settings
from kdexp.tracking import RunRecord, Tracking
from kdexp.variants import contenders, folder_of, load_variant, metrics_of, prefix_of

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
    trials: tuple[Candidate, ...]
    """What it was selected from: the study's trials and, where size is in bytes, such of their variants as came near."""
    model: str
    """Where MLflow loads it from: models:/name@alias; empty where the network cannot be exported."""

    @property
    def load(self) -> str:
        """How to load it in Python."""
        return f'mlflow.{"pytorch" if self.candidate.variant == AS_TRAINED else "onnx"}.load_model("{self.model}")'


def promote(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking, device: torch.device) -> Promotion:
    """Select by `rule`, evaluate the selected model, and only it, on test, and register it.

    A model is looked at once: its recorded test accuracy is used from then on. Raises NothingPasses.
    """
    settings.stores.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.stores / ".promote.lock"):  # two workers that finish together look at test once
        return _promote(study, rule, settings, tracking, device)


def _promote(study: RunRecord, rule: Selection, settings: Settings, tracking: Tracking, device: torch.device) -> Promotion:
    trials = candidates(study, tracking)
    if rule.size == "bytes" and available():
        trials = contenders(trials, rule, settings, tracking)
    chosen = select(trials, rule, study.tags["kdexp.study"])
    run = tracking.read(chosen.run_id)
    recipe = recipe_of(run, tracking)
    new_look = "test_accuracy" not in metrics_of(run, chosen.variant)
    if new_look:
        _look_at_test(run, chosen.variant, recipe, study, settings, tracking, device)
        run = tracking.read(chosen.run_id)
    model = _register(run, chosen.variant, recipe, study, rule, settings, tracking)
    found = metrics_of(run, chosen.variant)
    for other in tracking.find("trial", {"kdexp.study": study.tags["kdexp.study"], "kdexp.selected": rule.goal}):
        if other.run_id != chosen.run_id:
            tracking.tag(other.run_id, {"kdexp.selected": ""})
    tracking.tag(chosen.run_id, {"kdexp.selected": rule.goal})
    looks = sum(name.split("/")[-1] == "test_accuracy" for trial in _trials(study, tracking) for name in trial.metrics)
    promotion = Promotion(
        candidate=chosen,
        rule=rule,
        val_interval=(found["val_accuracy_low"], found["val_accuracy_high"]),
        test_accuracy=found["test_accuracy"],
        test_interval=(found["test_accuracy_low"], found["test_accuracy_high"]),
        test_samples=int(found["test_samples"]),
        new_look=new_look,
        looks=looks,
        trials=tuple(trials),
        model=model,
    )
    _report_on_study(study, promotion, tracking)
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
    accuracy = {trial.trial: trial.val_accuracy for trial in trials if trial.variant == AS_TRAINED}
    return accuracy[0] - accuracy[1] if 0 in accuracy and 1 in accuracy else None


def sweep_of(study: RunRecord, tracking: Tracking) -> Sweep:
    """The sweep file a study was last run with."""
    with tempfile.TemporaryDirectory() as temporary:
        return Sweep.model_validate_json(tracking.download(study.run_id, "sweep.json", Path(temporary)).read_text())


def _trials(study: RunRecord, tracking: Tracking) -> list[RunRecord]:
    runs = tracking.find("trial", {"mlflow.parentRunId": study.run_id})
    ended = [run for run in runs if run.status == "FINISHED" and "val_accuracy" in run.metrics]
    return sorted(ended, key=lambda run: int(run.tags["kdexp.trial"]))


def _look_at_test(
    run: RunRecord,
    variant: Variant,
    recipe: Recipe,
    study: RunRecord,
    settings: Settings,
    tracking: Tracking,
    device: torch.device,
) -> None:
    test = load_test(recipe.data, settings.data_dir, device)
    module = load_variant(run, recipe, variant, test, tracking).to(device)
    result = evaluate(module, test)
    low, high = result.interval
    tracking.log_dataset(run.run_id, recipe.data.dataset, "test", test.fingerprint, {"samples": len(test)})
    found = {
        "test_accuracy": result.accuracy,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_loss": result.loss,
        "test_samples": result.samples,
    }
    tracking.log_metrics(run.run_id, {f"{prefix_of(variant)}{name}": value for name, value in found.items()})
    note = (
        f"**Selected** by study *{study.tags['kdexp.study']}*{_as(variant)}. "
        f"Test accuracy **{result.accuracy:.2%}** (95 % interval {low:.2%} to {high:.2%}, {result.samples:,} images, "
        f"looked at once).\n\n{run.tags['mlflow.note.content']}"
    )
    tracking.tag(run.run_id, {"kdexp.test_looked_at": datetime.now(UTC).isoformat("T", "seconds"), "mlflow.note.content": note})


def _register(
    run: RunRecord,
    variant: Variant,
    recipe: Recipe,
    study: RunRecord,
    rule: Selection,
    settings: Settings,
    tracking: Tracking,
) -> str:
    """Register this variant of the run's student (once) and point the alias to it; the address MLflow loads it from."""
    name, alias = study.tags["kdexp.study"], rule.goal.replace("_", "-")
    tag, found = f"{prefix_of(variant)}kdexp.model_version", metrics_of(run, variant)
    version = run.tags.get(tag)
    if version:
        tracking.alias(name, alias, version)
    else:
        try:
            if variant == AS_TRAINED:
                _log_model(run, recipe, settings, tracking)
        except KdexpError:
            raise
        except Exception as error:  # torch.export refuses some networks, each in its own way
            tracking.tag(run.run_id, {"kdexp.not_registered": str(error)[:500]})
            return ""
        text = (
            f"Validation accuracy {found['val_accuracy']:.2%}, test accuracy {found['test_accuracy']:.2%}, "
            f"{int(found['parameters']):,} parameters{_as(variant)}. "
            f"Takes pixels 0 to 255 as {'float32' if variant == AS_TRAINED else 'uint8'}, gives logits."
        )
        version = tracking.register(run.run_id, name, alias, text, folder_of(variant))
        tracking.tag(run.run_id, {tag: version})
    return f"models:/{name}@{alias}"


def _log_model(run: RunRecord, recipe: Recipe, settings: Settings, tracking: Tracking) -> None:
    like = load_splits(recipe.data, settings.data_dir).train.take(torch.arange(2))  # what the network's input is like
    module = FromPixels(load_student(run, recipe, like, tracking), like).eval()
    example = like.images.float().expand(-1, like.channels, -1, -1).contiguous()
    tracking.log_model(run.run_id, module, example)


def _as(variant: Variant) -> str:
    return "" if variant == AS_TRAINED else f" as {variant}"


def _report_on_study(study: RunRecord, done: Promotion, tracking: Tracking) -> None:
    trials, chosen, (low, high) = done.trials, done.candidate, done.test_interval
    lines = [
        f"**Selected: trial {chosen.trial}{_as(chosen.variant)}**, run `{chosen.run_id}`: {chosen.parameters:,} parameters, "
        f"{chosen.val_accuracy:.2%} on validation, **{done.test_accuracy:.2%}** on test (95 % interval {low:.2%} to "
        f"{high:.2%}, {done.test_samples:,} images).",
        "",
        f"Rule: {done.rule.goal.replace('_', ' ')} by {done.rule.size.replace('_', '-')}, validation accuracy at least "
        f"{done.rule.accuracy_bar:.2%}. Load it: `{done.load}`. "
        f"Train it again: `kdexp reproduce {chosen.run_id}`.",
        "",
        "| trial | parameters | validation accuracy | run |",
        "|---|---|---|---|",
        *(
            f"| {c.trial}{_as(c.variant)}{' ← selected' if c == chosen else ''} "
            f"| {c.parameters:,} | {c.val_accuracy:.2%} | `{c.run_id}` |"
            for c in trials
        ),
    ]
    tracking.tag(study.run_id, {"mlflow.note.content": "\n".join(lines)[:8000], "kdexp.selected_run": chosen.run_id})
    metrics = {
        "trials": len({c.trial for c in trials}),
        "selected_parameters": chosen.parameters,
        "selected_val_accuracy": chosen.val_accuracy,
    }
    gained = gain(trials)
    tracking.log_metrics(study.run_id, metrics | ({"distillation_gain": gained} if gained is not None else {}))
    with tempfile.TemporaryDirectory() as temporary:
        frontier(trials, done.rule, chosen).savefig(Path(temporary) / "frontier.png", dpi=110)
        tracking.log_files(study.run_id, Path(temporary))
