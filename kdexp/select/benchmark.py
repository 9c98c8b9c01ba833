"""A student's deployable forms side by side: how large, how good, how fast each is here.

Sizes and accuracies are facts, kept with the run as kdexp export keeps them. Latencies are of one
machine at one moment: measured anew each time, the last ones kept with the run, with the machine
and the day. The test split is not touched.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from kdexp import KdexpError
from kdexp.config import Precision, Recipe, Variant
from kdexp.distill.compact import Replicated, as_stored, compact
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.deploy import Deployed, DeployError
from kdexp.distill.evaluate import logits_of
from kdexp.distill.latency import Latency, Runner, latencies, one_thread
from kdexp.distill.models import FromPixels, measure
from kdexp.environment import cpu_name
from kdexp.intervals import paired_interval, wilson_interval
from kdexp.runs.records import load_student, recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.select.students import student_named
from kdexp.select.variants import file_of, made, metrics_of, splits_of
from kdexp.select.verify import verify
from kdexp.selection import AS_TRAINED
from kdexp.settings import Settings

__all__ = ["Benchmark", "Form", "Timed", "below", "benchmark", "timed"]

TIMED = "mlflow.kdexp.benchmark"
"""The tag that keeps it. MLflow's page shows none that begins with mlflow. A file would have its
sum on record, which two that measure at once would break.
"""


@dataclass(frozen=True)
class Form:
    """One form of a student, by numbers."""

    variant: Variant
    bytes: int
    """Of all its numbers: weights, buffers, constants."""
    file_bytes: int
    multiply_adds: int
    activation_bytes: int | None
    """The most that its activations take at once for one image, in float32 (footprint.py); None
    where that cannot be found out.
    """
    accuracy: float
    """On validation."""
    gained: int
    """Validation images that it has right and the student as trained has not ..."""
    lost: int
    """... and the other way round."""
    same: float
    """Share of validation images on which both answer the same."""
    latency: Latency


@dataclass(frozen=True)
class Benchmark:
    """All forms of a run's student that can be made here."""

    run_id: str
    forms: tuple[Form, ...]
    """As trained first."""
    chosen: Form
    """The one that is registered under the given address, or was asked for; else the most accurate,
    of these the smallest file.
    """
    samples: int
    """Validation images."""
    held_out: bool
    """Whether these were held out of its training."""
    missing: str
    """Why there are not all forms; empty where there are."""

    def interval(self, form: Form) -> tuple[float, float]:
        """The 95 % interval of a form's accuracy (Wilson)."""
        return wilson_interval(round(form.accuracy * self.samples), self.samples)

    def against(self, form: Form) -> tuple[float, tuple[float, float]]:
        """How much more accurate a form is than the student as trained, and the 95 % interval of
        that, on the same images (Tango).
        """
        difference = (form.gained - form.lost) / self.samples
        return difference, paired_interval(form.gained, form.lost, self.samples)


@dataclass(frozen=True)
class Timed:
    """What a run's forms took when they were last measured."""

    machine: str
    """Its processor."""
    versions: Mapping[str, str]
    day: str
    seconds: Mapping[str, Latency]
    """By variant."""
    same: Mapping[str, float]
    """Share of validation images on which a form answers as the student as trained does."""


def benchmark(
    name: str, asked: Variant | None, settings: Settings, tracking: Tracking
) -> Benchmark:
    """Measure every form of a run's student (its ID, or models:/NAME@ALIAS) on the CPU. Forms that
    there were not yet are made, and kept with the run. Raises KdexpError.
    """
    run, registered = student_named(name, "benchmark", tracking)
    recipe = recipe_of(run, tracking)
    splits = splits_of(run, recipe, settings)
    cpu = torch.device("cpu")
    verify(run, recipe, AS_TRAINED, splits, tracking, cpu)
    precisions, missing = list[Precision](), ""
    for precision in get_args(Precision):
        try:
            run = made(run, recipe, precision, splits, tracking)
        except DeployError as error:
            missing = str(error)
            break
        verify(run, recipe, precision, splits, tracking, cpu)
        precisions.append(precision)
    forms = _forms(run, recipe, precisions, splits, tracking)
    with tracking.at_once(), suppress(KdexpError):  # a store that this person may only read
        tracking.tag(run.run_id, {TIMED: _kept(forms)})
    return Benchmark(
        run_id=run.run_id,
        forms=forms,
        chosen=_chosen(forms, asked or (registered if name != run.run_id else None), missing),
        samples=len(splits.validation),
        held_out=not recipe.data.train_on_validation,
        missing=missing,
    )


def timed(run: RunRecord) -> Timed | None:
    """What a run's forms took when they were last measured; None where they were not."""
    try:
        stored = json.loads(run.tags[TIMED])
        seconds = {name: Latency(**each) for name, each in stored.pop("seconds").items()}
        return Timed(**stored, seconds=seconds)
    except (KeyError, TypeError, ValueError):  # none, or not as it was written
        return None


def _kept(forms: tuple[Form, ...]) -> str:
    found = Timed(
        cpu_name(),
        {name: version(name) for name in ("torch", "onnxruntime") if _is_here(name)},
        f"{datetime.now(UTC):%Y-%m-%d}",
        {form.variant: form.latency for form in forms},
        {form.variant: form.same for form in forms},
    )
    return json.dumps(asdict(found))


def _is_here(name: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(name))
    return False


def below(done: Benchmark, floor: float) -> str:
    """That the chosen form is less accurate than `floor`, in one line; empty where it is not."""
    chosen = done.chosen
    if chosen.accuracy >= floor:
        return ""
    return (
        f"Run {done.run_id}: {chosen.variant} has {chosen.accuracy:.2%} on {done.samples:,}"
        f" validation images, below --floor {floor:.2%}; choose another run (kdexp select), another"
        " --form, or lower the floor."
    )


def _chosen(forms: tuple[Form, ...], wanted: Variant | None, missing: str) -> Form:
    if wanted is None:
        return max(forms, key=lambda form: (form.accuracy, -form.file_bytes))
    found = next((form for form in forms if form.variant == wanted), None)
    if found is None:
        raise KdexpError(f"--form {wanted}: cannot be made here: {missing}")
    return found


def _forms(
    run: RunRecord,
    recipe: Recipe,
    precisions: list[Precision],
    splits: Splits,
    tracking: Tracking,
) -> tuple[Form, ...]:
    like = splits.validation
    student = load_student(run, recipe, like, tracking)
    with tempfile.TemporaryDirectory() as temporary, one_thread():
        folder = Path(temporary)
        files: dict[Variant, Path] = {
            AS_TRAINED: tracking.download(run.run_id, "weights.safetensors", folder),
            **{each: file_of(run, each, folder, tracking) for each in precisions},
        }
        sizes = {variant: file.stat().st_size for variant, file in files.items()}
        # ONNX Runtime takes as many threads as torch has now: one
        deployed: dict[Variant, Deployed] = {
            each: Deployed(files[each].read_bytes(), like) for each in precisions
        }
    runners: dict[str, Runner] = {
        AS_TRAINED: _as_trained(student, like),
        **{each: module.from_pixels for each, module in deployed.items()},
    }
    modules: dict[Variant, nn.Module] = {AS_TRAINED: student}
    modules |= deployed
    answers = {name: logits_of(module, like).argmax(1) for name, module in modules.items()}
    speeds = latencies(runners, like.images)
    whole, folded = measure(student, like), measure(compact(student, like), as_stored(like))
    return tuple(
        _form(
            name,
            metrics_of(run, name),
            sizes[name],
            (whole if name == AS_TRAINED else folded).activation_bytes,
            (answers[name], answers[AS_TRAINED], like.labels),
            speeds[name],
        )
        for name in modules
    )


def _form(
    variant: Variant,
    metrics: Mapping[str, float],
    file_bytes: int,
    activations: int | None,
    answers: tuple[Int64[Tensor, " samples"], ...],
    latency: Latency,
) -> Form:
    own, trained, labels = answers
    right, was_right = own == labels, trained == labels
    return Form(
        variant=variant,
        bytes=int(metrics["model_bytes"]),
        file_bytes=file_bytes,
        multiply_adds=int(metrics["multiply_adds"]),
        activation_bytes=activations,
        accuracy=float(right.double().mean()),
        gained=int((right & ~was_right).sum()),
        lost=int((~right & was_right).sum()),
        same=float((own == trained).double().mean()),
        latency=latency,
    )


def _as_trained(student: nn.Module, like: Split) -> Runner:
    """The student as torch runs it, from pixels as they are stored, like its files."""
    replicated = like.channels != as_stored(like).channels
    return FromPixels(Replicated(student, like.channels) if replicated else student, like).eval()
