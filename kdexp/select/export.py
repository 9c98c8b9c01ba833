"""A run's student as a file to deploy: one ONNX file, measured on validation by running it. The
test split is not touched.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from kdexp.config import Precision
from kdexp.distill.compact import as_stored
from kdexp.distill.deploy import Deployed
from kdexp.distill.evaluate import Evaluation, evaluate
from kdexp.distill.models import Size
from kdexp.files import check_output, write_output
from kdexp.runs.records import load_student, recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.select.students import check_student
from kdexp.select.variants import file_of, made, metrics_of, splits_of
from kdexp.select.verify import verify
from kdexp.selection import AS_TRAINED
from kdexp.settings import Settings

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """A file, what it takes, and how good it is beside the run that it comes from."""

    file: Path
    shape: tuple[int, int, int]
    """Of an image: channels, height, width."""
    size: Size
    """Its bytes are those of the weights alone."""
    file_bytes: int
    validation: Evaluation
    trained_accuracy: float
    """The same of the student as it was trained."""
    held_out: bool
    """Whether validation images were; else accuracy on them says only what rounding did."""


def export(
    run_id: str, precision: Precision, output: Path | None, settings: Settings, tracking: Tracking
) -> Exported:
    """Write a run's student, folded and in this precision, as `output` (RUN_ID-PRECISION.onnx),
    whole or not at all.

    Raises KdexpError.
    """
    run, file = tracking.read(run_id), output or Path(f"{run_id}-{precision}.onnx")
    check_student(run, "export", tracking)
    check_output("--output", file, "student.onnx")
    recipe = recipe_of(run, tracking)
    splits = splits_of(run, recipe, settings)
    held_out = not recipe.data.train_on_validation
    cpu = torch.device("cpu")
    verify(run, recipe, AS_TRAINED, splits, tracking, cpu)
    run = made(run, recipe, precision, splits, tracking)
    verify(run, recipe, precision, splits, tracking, cpu)
    with tempfile.TemporaryDirectory() as temporary:
        content = file_of(run, precision, Path(temporary), tracking).read_bytes()
    write_output("--output", file, lambda path: path.write_bytes(content))
    found, validation = metrics_of(run, precision), splits.validation
    trained = (
        None
        if held_out
        else evaluate(load_student(run, recipe, validation, tracking), validation).accuracy
    )
    return Exported(
        file=file,
        shape=(as_stored(validation).channels, *validation.image_size),
        size=Size.recorded(found),
        file_bytes=file.stat().st_size,
        validation=evaluate(Deployed(file.read_bytes(), validation), validation),
        trained_accuracy=run.metrics["val_accuracy"] if trained is None else trained,
        held_out=held_out,
    )
