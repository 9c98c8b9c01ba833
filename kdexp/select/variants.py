"""The smaller forms of a trained student, its *variants*: folded, and stored in float32, float16 or
int8.

Each is an ONNX file that is run on validation once; file and numbers are then with the student's
run. Where size is in bytes all of them compete. A variant can never be smaller than its parameters,
so for the smallest most need not be built. For the most accurate each has to be, since rounding may
gain as well as lose. Variants of a trial that misses the bar are ignored: rounding can only pass
the bar by luck.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from kdexp import KdexpError
from kdexp.config import Precision, Recipe, Selection, Variant
from kdexp.distill.compact import as_stored, compact
from kdexp.distill.datasets import Split, Splits, load_splits
from kdexp.distill.deploy import Deployed, DeployError, convert, least_bytes, stored_bytes
from kdexp.distill.evaluate import Evaluation, evaluate
from kdexp.distill.models import Size, measure, outline
from kdexp.runs.records import artifact_of, load_student, recipe_of, seal
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.selection import AS_TRAINED, Candidate, passes, rank
from kdexp.settings import Settings, without_credentials

__all__ = [
    "contenders",
    "file_of",
    "folder_of",
    "load_variant",
    "made",
    "metrics_of",
    "needed",
    "prefix_of",
    "same_images",
    "splits_of",
    "stored",
]


def prefix_of(variant: Variant) -> str:
    """What the names of a variant's metrics begin with on its run."""
    return "" if variant == AS_TRAINED else f"{variant}/"


def metrics_of(run: RunRecord, variant: Variant) -> dict[str, float]:
    """A variant's metrics by their plain names."""
    prefix = prefix_of(variant)
    return {
        name.removeprefix(prefix): value
        for name, value in run.metrics.items()
        if name.startswith(prefix)
    }


def folder_of(variant: Variant) -> str:
    """Where on its run a variant lies as an MLflow model."""
    return "model" if variant == AS_TRAINED else f"variants/{variant}"


def contenders(
    trials: Sequence[Candidate], rule: Selection, settings: Settings, tracking: Tracking
) -> list[Candidate]:
    """These trials, and so many of their variants, measured, that the best by `rule` among all
    variants is there.
    """
    unlimited = rule.model_copy(update={"limit": None})
    good = [trial for trial in trials if passes(trial, unlimited)]
    if not good:
        return list(trials)
    runs = {trial.run_id: tracking.read(trial.run_id) for trial in good}
    recipes = {run_id: recipe_of(run, tracking) for run_id, run in runs.items()}
    first = good[0].run_id
    maker = _Maker(runs, recipes, splits_of(runs[first], recipes[first], settings), tracking)
    found = needed(
        [*good, *(hope for trial in good for hope in maker.hopes(trial))], rule, maker.measured
    )
    return [*trials, *(candidate for candidate in found if candidate.variant != AS_TRAINED)]


def needed(
    hopes: Iterable[Candidate], rule: Selection, measured: Callable[[Candidate], Candidate | None]
) -> list[Candidate]:
    """All that had to be measured until one was the best by `rule`, whatever the rest may come to.

    `hopes` are at least as small and as accurate as `measured` will find them; it gives None where
    there is no such variant.
    """
    fitting = (hope for hope in hopes if passes(hope, rule))
    found: list[Candidate] = []
    best: Candidate | None = None
    for hope in sorted(fitting, key=lambda candidate: rank(candidate, rule)):
        if best and rank(best, rule) <= rank(hope, rule):
            break
        real = measured(hope)
        if real is None:
            continue
        found.append(real)
        if passes(real, rule) and (best is None or rank(real, rule) < rank(best, rule)):
            best = real
    return found


def made(
    run: RunRecord, recipe: Recipe, precision: Precision, splits: Splits, tracking: Tracking
) -> RunRecord:
    """The run with this variant's file and numbers, measured now if they are not there yet. Raises
    DeployError.
    """
    prefix = prefix_of(precision)
    if f"{prefix}model_bytes" in run.metrics:
        return run
    student, like = load_student(run, recipe, splits.train, tracking), splits.validation
    model = convert(student, splits.train, precision)
    found = _metrics(student, recipe, model.SerializeToString(), like)
    example = like.take(torch.arange(2)).images.numpy()
    sums = tracking.log_onnx(run.run_id, model, example, folder_of(precision), like.classes)
    seal(run.run_id, sums, tracking)
    tracking.log_metrics(run.run_id, {f"{prefix}{name}": value for name, value in found.items()})
    return tracking.read(run.run_id)


def stored(
    run: RunRecord, recipe: Recipe, precision: Precision, splits: Splits, tracking: Tracking
) -> dict[str, float]:
    """A variant's metrics, measured with the file that is on its run's record. Raises
    RecordError.
    """
    like = splits.validation
    with tempfile.TemporaryDirectory() as temporary:
        content = file_of(run, precision, Path(temporary), tracking).read_bytes()
    found = _metrics(load_student(run, recipe, like, tracking), recipe, content, like)
    return {f"{prefix_of(precision)}{name}": float(value) for name, value in found.items()}


def file_of(run: RunRecord, precision: Precision, folder: Path, tracking: Tracking) -> Path:
    """A variant's ONNX file out of its run's record. Raises RecordError where it is another than
    was recorded.
    """
    return artifact_of(run, f"{folder_of(precision)}/model.onnx", folder, tracking)


def load_variant(
    run: RunRecord, recipe: Recipe, variant: Variant, like: Split, tracking: Tracking
) -> nn.Module:
    """The student of a finished run in one of its variants."""
    if variant == AS_TRAINED:
        return load_student(run, recipe, like, tracking)
    with tempfile.TemporaryDirectory() as temporary:
        return Deployed(file_of(run, variant, Path(temporary), tracking).read_bytes(), like)


def splits_of(run: RunRecord, recipe: Recipe, settings: Settings) -> Splits:
    """Training and validation set of a run. Raises KdexpError where the images here are others."""
    splits = load_splits(recipe.data, settings.data_dir)
    same_images(run, recipe, splits)
    return splits


def same_images(run: RunRecord, recipe: Recipe, splits: Splits) -> None:
    """That a run was trained on these images. Raises KdexpError."""
    for tag, split in (
        ("kdexp.train_sha256", splits.train),
        ("kdexp.validation_sha256", splits.validation),
    ):
        if run.tags.get(tag, split.fingerprint) != split.fingerprint:
            raise KdexpError(
                f"Run {run.run_id} was trained on other images ({tag} {run.tags[tag][:12]}…, here"
                f" {split.fingerprint[:12]}…): accuracies would not compare. Put its"
                f" {recipe.data.dataset} back, or name its folder (--data-dir)."
            )


def _metrics(student: nn.Module, recipe: Recipe, content: bytes, like: Split) -> dict[str, float]:
    """Sizes and validation accuracy of a student's ONNX file."""
    size = measure(compact(student, like), as_stored(like))
    return {
        **replace(size, bytes=stored_bytes(content)).metrics,
        **(
            {}
            if recipe.data.train_on_validation
            else _measured(evaluate(Deployed(content, like), like))
        ),
    }


def _measured(result: Evaluation) -> dict[str, float]:
    low, high = result.interval
    return {"val_accuracy": result.accuracy, "val_accuracy_low": low, "val_accuracy_high": high}


@dataclass(frozen=True)
class _Maker:
    """What it takes to make the variants of these runs, which share their data."""

    runs: Mapping[str, RunRecord]
    recipes: Mapping[str, Recipe]
    splits: Splits
    tracking: Tracking

    def hopes(self, trial: Candidate) -> list[Candidate]:
        """A trial's variants at their best: without an error, and nothing in the file but its
        parameters.
        """
        student = outline(self.recipes[trial.run_id].student, self.splits.train)
        train = self.splits.train
        hope = replace(trial, val_accuracy=1.0)
        return [
            replace(hope, variant=p, bytes=least_bytes(student, train, p))
            for p in get_args(Precision)
        ]

    def measured(self, hope: Candidate) -> Candidate | None:
        """The same as it is; None where the network cannot be exported, with the reason on its
        run.
        """
        if hope.variant == AS_TRAINED:
            return hope
        try:
            run = made(
                self.runs[hope.run_id],
                self.recipes[hope.run_id],
                hope.variant,
                self.splits,
                self.tracking,
            )
        except DeployError as error:
            self.tracking.tag(
                hope.run_id, {"kdexp.not_exported": without_credentials(str(error))[:500]}
            )
            return None
        found = metrics_of(run, hope.variant)
        return replace(
            hope,
            **asdict(Size.recorded(found)),
            val_accuracy=found["val_accuracy"],
        )
