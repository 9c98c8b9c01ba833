"""Data and teacher of a recipe, ready for its trainings, with the teacher on record."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from kdexp import KdexpError
from kdexp.config import Distillation, Recipe, Student, Training, flatten
from kdexp.distill.datasets import Inspection, Splits, load_splits
from kdexp.distill.guard import check_network
from kdexp.distill.logits import CacheProgress
from kdexp.distill.models import outline
from kdexp.distill.teacher import CachedTeacher, WeightsRead, prepare_teacher
from kdexp.distill.train import EpochReport
from kdexp.runs import describe
from kdexp.runs.bench import Bench
from kdexp.runs.recording import closed, log_datasets
from kdexp.runs.records import seal
from kdexp.runs.tracking import EpochMetrics
from kdexp.settings import Settings
from kdexp.workers.work import Prepared

__all__ = ["TeacherProgress", "prepare", "read_images"]

TeacherProgress = Inspection | EpochReport | CacheProgress | WeightsRead


def prepare(
    recipe: Recipe,
    bench: Bench,
    weights: Path | None = None,
    training: Training | None = None,
    students: Sequence[Student] = (),
    check: Callable[[Splits], object] | None = None,
    losses: Sequence[str] = (),
    whole: bool = False,
) -> Generator[TeacherProgress, None, Prepared]:
    """Yields what was read, and progress while the teacher is made.

    Give `training` where all trials share its seed and epochs: the teacher's cache may then be
    smaller. With `whole` it serves trainings on every fold (`Prepared.on`); with random erasing it
    cannot, and is then for the recipe's own training on its own fold. Before the teacher is
    trained, this finds out that the recipe's student and these `students` can be built, that its
    loss and these `losses` can teach so many classes, and whatever `check` raises of the data.
    """
    splits = yield from read_images(recipe, bench.settings, bench.device, students, check, losses)
    if recipe.training.random_erasing:  # drawn anew in every epoch of a seed
        whole, training = False, training or recipe.training
    folder = bench.settings.teachers
    teacher = yield from prepare_teacher(
        recipe.teacher, recipe.data, splits, folder, weights, training, whole
    )
    return Prepared(recipe.data, splits, teacher, _teacher_run(recipe, teacher, splits, bench))


def read_images(
    recipe: Recipe,
    settings: Settings,
    device: torch.device,
    students: Sequence[Student] = (),
    check: Callable[[Splits], object] | None = None,
    losses: Sequence[str] = (),
) -> Generator[Inspection, None, Splits]:
    """The images of a recipe, and all that `prepare` finds out before it trains a teacher. Nothing
    is written.
    """
    splits = load_splits(recipe.data, settings.data_dir, device)
    if splits.inspection:
        yield splits.inspection
    if check:
        check(splits)
    _check_loss([recipe.distillation.loss, *losses], recipe.distillation, splits.train.classes)
    check_network(recipe.student, splits.train)
    for student in students:  # of which one may fail in training, and its trials alone
        outline(student, splits.train)
    return splits


def _check_loss(losses: Sequence[str], how: Distillation, classes: Sequence[str]) -> None:
    """That a loss can teach so many classes. Runs of former versions (`population`) train again."""
    two = len(classes) == 2 and how.standard_deviation == "sample"
    if "standardized" in losses and two:
        raise KdexpError(
            f"distillation.loss: standardized teaches nothing of 2 classes ({', '.join(classes)}): "
            "two standardised logits are always the same two numbers; allowed here: kl, "
            "decoupled, correlation"
        )


def _teacher_run(recipe: Recipe, teacher: CachedTeacher, splits: Splits, bench: Bench) -> str:
    """The teacher's own run in this store: its accuracy, curves and weights, recorded once."""
    tracking = bench.tracking
    # commands that start together record it once
    with FileLock(bench.settings.teachers / "run.lock"):
        for run in tracking.find("teacher", {"kdexp.weights_sha256": teacher.sha256}):
            if run.status == "FINISHED":
                return run.run_id
            if run.status == "RUNNING":  # we hold the lock: whoever began it is gone
                tracking.finish(run.run_id, "KILLED")
        return _record_teacher(recipe, teacher, splits, bench)


def _record_teacher(recipe: Recipe, teacher: CachedTeacher, splits: Splits, bench: Bench) -> str:
    tracking, (low, high) = bench.tracking, teacher.val_interval
    data = recipe.teacher.data(recipe.data)
    if recipe.data != data:  # its students hold out something else
        recipe, splits = recipe.model_copy(update={"data": data}), splits.cut_by(data)
    own = {
        key: value
        for key, value in flatten(recipe).items()
        if key.startswith(("data.", "teacher."))
    }
    run_id = tracking.start(
        bench.experiment_id,
        "teacher",
        f"teacher · {describe.named(recipe.teacher)}",
        params=own,
        tags={
            "kdexp.weights_sha256": teacher.sha256,
            "mlflow.note.content": describe.of_teacher(recipe, teacher),
            **({"kdexp.start_sha256": teacher.start_sha256} if teacher.start_sha256 else {}),
        },
    )
    with closed(run_id, tracking), tempfile.TemporaryDirectory() as temporary:
        now = time.time_ns() // 1_000_000
        epochs = [
            EpochMetrics(
                int(row["epoch"]),
                now,
                {f"epoch/{name}": row[name] for name in row if name != "epoch"},
            )
            for row in teacher.history
        ]
        tracking.log_epochs(run_id, epochs)
        accuracy = teacher.val_accuracy
        measured = {"val_accuracy": accuracy, "val_accuracy_low": low, "val_accuracy_high": high}
        tracking.log_metrics(run_id, {"parameters": teacher.parameters, **measured})
        folder = Path(temporary)
        (folder / "config.json").write_text(recipe.model_dump_json(indent=2), "utf-8")
        (folder / "weights.safetensors").symlink_to(teacher.weights.resolve())
        seal(run_id, tracking.log_files(run_id, folder), tracking)
        log_datasets(run_id, recipe.data, splits, tracking)
    return run_id
