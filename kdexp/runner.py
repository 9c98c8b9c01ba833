"""The seam between distillation and tracking: one training, from a recipe to a finished MLflow run.

`sweep`, `train` and `reproduce` all go through `started`, so what one records another can rebuild. The record
(whole config, environment, fingerprints) is written before the first step and fails loudly.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from kdexp import KdexpError
from kdexp.config import Data, Distillation, Recipe, Student, Training, flatten
from kdexp.distill.checkpoints import CHECKPOINT_SECONDS, Checkpoint, Kept, State
from kdexp.distill.data import Inspection, Split, Splits, load_splits, views
from kdexp.distill.execution import choose, compiles
from kdexp.distill.guard import check_network, stored_correct
from kdexp.distill.models import Size, measure, outline, summary, weights_hash
from kdexp.distill.packs import Execution, Lane, Source
from kdexp.distill.teacher import CachedTeacher, CacheProgress, WeightsRead, prepare_teacher
from kdexp.distill.train import EpochReport, Snapshot, train
from kdexp.environment import record
from kdexp.intervals import wilson_interval
from kdexp.plots import curves
from kdexp.records import seal
from kdexp.settings import Settings, without_credentials
from kdexp.tracking import EpochMetrics, Kind, Tracking, TrackingAway

__all__ = [
    "EPOCH_METRICS",
    "Prepared",
    "Result",
    "Running",
    "TeacherProgress",
    "environment_of",
    "facts",
    "goes_on_here",
    "prepare",
    "profile_of",
    "started",
]

EPOCH_METRICS = (
    "loss", "distillation_loss", "student_loss", "val_accuracy", "val_loss", "learning_rate", "seconds",
)  # fmt: skip
DELIVER_SECONDS = 30.0  # an epoch's record costs MLflow 15 ms: a thousandth of an epoch that long, and batches of short ones
ELSEWHERE = ("threads", "commit")  # a resumed training sets its own threads; the source's hash says more than the commit
TeacherProgress = Inspection | EpochReport | CacheProgress | WeightsRead


@dataclass(frozen=True)
class Prepared:
    """What every trial of a study shares: data and teacher, and where they are recorded."""

    data: Data
    splits: Splits
    teacher: CachedTeacher
    teacher_run: str

    @property
    def source(self) -> Source:
        """What batches of labelled images are gathered from."""
        train = self.splits.train
        return Source(train, views(self.data.augment).to(train.labels.device), None)


@dataclass(frozen=True)
class Result:
    """What came of one training."""

    run_id: str
    state: State
    size: Size
    val_accuracy: float
    val_samples: int
    val_interval: tuple[float, float]
    kept_epoch: int
    epochs: int


@dataclass
class Running:
    """A training under way: iterate `epochs()`; set `state` to 'pruned' and stop iterating to end it early."""

    run_id: str
    recipe: Recipe
    prepared: Prepared
    tracking: Tracking
    size: Size
    how: Execution
    place: int
    environment: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[Checkpoint], object] | None = None
    """Where checkpoints go; without, there are none."""
    state: State = "complete"
    kept: Kept | None = None
    bad_step: int | None = None
    begun: Snapshot | None = None
    """Where `epochs()` goes on from."""
    history: list[dict[str, float]] = field(default_factory=list)
    safe: int = 0
    """So many epochs of the history are in a checkpoint (or need none) ..."""
    sent: int = 0
    """... and so many are with MLflow."""
    saved: float = -math.inf
    delivered: float = -math.inf
    result: Result | None = None

    def epochs(self) -> Iterator[EpochReport]:
        """Train in a pack of its own, whose other lanes are copies, and record each epoch as it comes."""
        over = self.state != "complete"  # resumed between its last epoch and its end
        if over:
            return
        lanes, begun, shared = [Lane.of(self.recipe)] * self.how.lanes, [self.begun] * self.how.lanes, self.prepared
        for reports in train(lanes, shared.splits, shared.data, shared.teacher.soft, self.how, resumed=begun):
            report = reports[self.place]
            assert report is not None
            self.record(report)
            self.settle(report)
            yield report
            if self.state == "diverged":
                return

    def record(self, report: EpochReport) -> None:
        """Take note of an epoch; a loss that is not finite makes the state 'diverged'."""
        values = {name: getattr(report, name) for name in EPOCH_METRICS}
        self.history.append({"epoch": report.epoch, "time_ms": time.time_ns() // 1_000_000, **values})
        if not report.finite:
            self.state, self.bad_step = "diverged", report.bad_step
        elif report.weights is not None:
            self.kept = Kept(report.epoch, report.val_correct, report.weights)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from there. What was measured is sent again from the first: what MLflow has, it stores once."""
        self.state, self.kept, self.bad_step = checkpoint.state, checkpoint.kept, checkpoint.bad_step
        self.begun = checkpoint.snapshot
        self.history = [dict(row) for row in checkpoint.history]
        self.safe = len(self.history)
        tags = {"kdexp.state": "", "kdexp.error": "", "kdexp.resumed_from_epoch": str(checkpoint.snapshot.epoch)}
        self.tracking.tag(self.run_id, tags)

    def settle(self, report: EpochReport) -> None:
        """After an epoch, once its verdict is known: a checkpoint where one is due, and MLflow's share."""
        now, last = time.monotonic(), self.state != "complete" or report.epoch == report.epochs
        if self.keep is None:
            self.safe = len(self.history)
        elif last or now - self.saved >= CHECKPOINT_SECONDS:
            assert report.snapshot is not None
            snapshot = report.snapshot()
            found = self.run_id, self.environment, self.state, self.bad_step, self.history, self.kept
            self.keep(Checkpoint(*found, snapshot))
            self.saved, self.safe = now, len(self.history)
        if now - self.delivered >= DELIVER_SECONDS:
            self.delivered = now
            with self.tracking.at_once(), suppress(TrackingAway):  # then later: training does not wait
                self.deliver()

    def deliver(self) -> None:
        """Send what MLflow does not have yet."""
        due = [
            EpochMetrics(int(row["epoch"]), int(row["time_ms"]), {f"epoch/{name}": row[name] for name in EPOCH_METRICS})
            for row in self.history[self.sent : self.safe]
        ]
        self.tracking.log_epochs(self.run_id, due)
        self.sent = self.safe


def prepare(
    recipe: Recipe,
    settings: Settings,
    tracking: Tracking,
    experiment_id: str,
    device: torch.device,
    weights: Path | None = None,
    training: Training | None = None,
    students: Sequence[Student] = (),
    check: Callable[[Splits], object] | None = None,
    losses: Sequence[str] = (),
) -> Generator[TeacherProgress, None, Prepared]:
    """Data and teacher of a recipe, ready for its trials; yields what was read, and progress while the teacher is made.

    `training` where all trials share its seed and epochs: the teacher's cache may then be the smaller for it. That the
    recipe's student and these `students` can be built and trained, and that its loss and these `losses` have
    something to say of its classes, is found out before the teacher is, and so is whatever `check` raises of the data.
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
    if recipe.data.train_on_validation and weights is None:  # the teacher has never seen validation
        held_out = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on_validation": False})})
        weights = (yield from prepare(held_out, settings, tracking, experiment_id, device)).teacher.weights
    teacher = yield from prepare_teacher(recipe.teacher, recipe.data, splits, settings.teachers, weights, training)
    return Prepared(recipe.data, splits, teacher, _teacher_run(recipe, teacher, splits, settings, tracking, experiment_id))


def _check_loss(losses: Sequence[str], how: Distillation, classes: Sequence[str]) -> None:
    """That a loss can teach so many classes. A run of a former version, by `population`, is trained again as it was."""
    if "standardized" in losses and len(classes) == 2 and how.standard_deviation == "sample":
        raise KdexpError(
            f"distillation.loss: standardized teaches nothing of 2 classes ({', '.join(classes)}): two standardised logits are "
            f"always the same two numbers; allowed here: kl, decoupled, correlation"
        )


@contextmanager
def started(
    recipe: Recipe,
    prepared: Prepared,
    tracking: Tracking,
    experiment_id: str,
    kind: Kind,
    name: str,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    how: Execution | None = None,
    place: int = 0,
    keep: Callable[[Checkpoint], object] | None = None,
    resumed: Checkpoint | None = None,
) -> Iterator[Running]:
    """A run around one training: recorded before it, closed after it, whatever happens in between.

    `how` it is carried out, and in which place of a pack, is chosen for a training of its own if not given. With
    `resumed` it is that checkpoint's run which goes on. Left normally: FINISHED, with final metrics and artifacts.
    Interrupted: KILLED. Failed: FAILED.
    """
    train_split = prepared.splits.train
    module = outline(recipe.student, train_split)
    size = measure(module, train_split)
    how = how or choose([Lane.of(recipe)], train_split)
    if resumed:
        run_id = resumed.run_id
        tracking.finish(run_id, "RUNNING")
    else:
        run_id = tracking.start(
            experiment_id,
            kind,
            name,
            params={**flatten(recipe), **(params or {})},
            tags={
                "kdexp.teacher_run": prepared.teacher_run,
                "kdexp.logits_per": prepared.teacher.soft.per,
                **facts(prepared),
                "mlflow.note.content": _describe(recipe, size, prepared),
                **(tags or {}),
            },
            parent=parent,
        )
    environment = resumed.environment if resumed else environment_of(recipe, prepared, how, place)
    running = Running(run_id, recipe, prepared, tracking, size, how, place, environment, keep)
    with _closed(run_id, tracking):
        if resumed:
            running.resume(resumed)
        else:
            _log_record(running, summary(module, train_split))
        try:
            yield running
        except BaseException:
            with tracking.at_once(), suppress(KdexpError):  # where the store is what failed, its error is the one to hear of
                running.deliver()
            raise
        running.deliver()
        running.result = _conclude(running)


def facts(prepared: Prepared) -> dict[str, str]:
    """SHA-256 of data and teacher, by the tags that record them."""
    return {
        "kdexp.teacher_sha256": prepared.teacher.sha256,
        "kdexp.logits_sha256": prepared.teacher.logits_sha256,
        "kdexp.train_sha256": prepared.splits.train.fingerprint,
        "kdexp.validation_sha256": prepared.splits.validation.fingerprint,
    }


def environment_of(recipe: Recipe, prepared: Prepared, how: Execution, place: int) -> dict[str, str]:
    """All that a training's last bits depend on here besides its recipe, as text by name."""
    machine = record(prepared.splits.train.labels.device.type, recipe)
    return {**machine, "soft labels": prepared.teacher.logits_sha256[:16], **how.record(place)}


def goes_on_here(checkpoint: Checkpoint, recipe: Recipe, prepared: Prepared) -> bool:
    """Whether a training that goes on here from its checkpoint ends as it would have ended unbroken."""
    here, then = environment_of(recipe, prepared, *Execution.recorded(checkpoint.environment)), checkpoint.environment
    same = all(then.get(name) == value for name, value in here.items() if name not in ELSEWHERE)
    return same and (then["compiled"] == "no" or compiles(str(prepared.splits.train.labels.device)))


def _log_record(running: Running, summary: str) -> None:
    """What makes a run reproducible, before its first step."""
    tracking, run_id, splits = running.tracking, running.run_id, running.prepared.splits
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(running.recipe.model_dump_json(indent=2), "utf-8")
        (folder / "environment.json").write_text(json.dumps(running.environment, indent=2), "utf-8")
        (folder / "model_summary.txt").write_text(summary, "utf-8")
        seal(run_id, tracking.log_files(run_id, folder), tracking)
    _log_datasets(tracking, run_id, running.recipe.data, {"training": splits.train, "validation": splits.validation})


def _describe(recipe: Recipe, size: Size, prepared: Prepared) -> str:
    """A run's description for someone who has never seen kdexp, in Markdown."""
    how, training, teacher = recipe.distillation, recipe.training, prepared.teacher
    seen = "it was trained on: no measure of it" if recipe.data.train_on_validation else "held out of the training set"
    return "\n".join(
        [
            f"A small network (the *student*, {_named(recipe.student)}) learns {recipe.data.dataset} from the labels and "
            f"from the *soft labels* of a larger one (the *teacher*, {_named(recipe.teacher)}).",
            "",
            "| | |",
            "|---|---|",
            f"| student | {size.parameters:,} parameters, {size.multiply_adds:,} multiply-adds, {size.bytes:,} bytes |",
            f"| teacher | {teacher.parameters:,} parameters, {teacher.val_accuracy:.2%} on validation |",
            f"| alpha | {how.alpha:.4g}: the teacher's weight in the loss; the labels have {1 - how.alpha:.4g} |",
            f"| temperature | {how.temperature:.4g} (T² factor {'on' if how.times_t_squared else 'off'}) |",
            f"| training | {training.epochs} epochs, {training.optimizer}, learning rate {training.learning_rate:.3g} "
            f"({training.schedule}), batch {training.batch_size}, seed {training.seed} |",
            "",
            f"`val_accuracy` is measured on images {seen}; `epoch/…` are the curves. "
            "Artifacts: `config.json` is the whole recipe, `weights.safetensors` the student.",
        ]
    )


def _conclude(running: Running) -> Result:
    """Final metrics, weights and curves on the run."""
    tracking, run_id, kept, size = running.tracking, running.run_id, running.kept, running.size
    validation = running.prepared.splits.validation
    correct = kept.val_correct if kept else 0
    if kept and kept.weights:
        correct = stored_correct(running.recipe.student, kept.weights, correct, validation)
    low, high = wilson_interval(correct, len(validation))
    sha256 = weights_hash(kept.weights) if kept and kept.weights else ""
    held_out = not running.recipe.data.train_on_validation
    result = Result(
        run_id=run_id,
        state=running.state,
        size=size,
        val_accuracy=correct / len(validation),
        val_samples=len(validation),
        val_interval=(low, high),
        kept_epoch=kept.epoch if kept else 0,
        epochs=len(running.history),
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if kept and kept.weights:
            save_file(dict(kept.weights), folder / "weights.safetensors")
        title = f"{_named(running.recipe.student)}, {size.parameters:,} parameters"
        curves(running.history, title, result.kept_epoch).savefig(folder / "curves.png", dpi=110)
        seal(run_id, tracking.log_files(run_id, folder), tracking)
    tracking.log_metrics(
        run_id,
        {
            "parameters": size.parameters,
            "multiply_adds": size.multiply_adds,
            "model_bytes": size.bytes,
            **(_measured(result) if held_out else {}),
            "kept_epoch": result.kept_epoch,
            "epochs_trained": result.epochs,
            "train_seconds": sum(row["seconds"] for row in running.history),
            "teacher_val_accuracy": running.prepared.teacher.val_accuracy,
        },
        time_ms=int(running.history[-1]["time_ms"]) if running.history else None,
    )
    diverged = f"Diverged (loss not finite from step {running.bad_step})"
    how = {"complete": "Trained to the end", "pruned": "Pruned", "diverged": diverged}[running.state]
    accuracy = f"**{result.val_accuracy:.2%}** validation accuracy (95 % interval {low:.2%} to {high:.2%})"
    note = (
        f"{accuracy if held_out else 'Trained on train and validation together,'} with "
        f"**{size.parameters:,}** parameters. {how} after {result.epochs} epochs; weights of epoch {result.kept_epoch}.\n\n"
        f"Train it again, bit for bit: `kdexp reproduce {run_id}`"
    )
    tracking.tag(
        run_id,
        {
            "kdexp.state": running.state,
            "kdexp.weights_sha256": sha256,
            **({"kdexp.bad_step": str(running.bad_step)} if running.state == "diverged" else {}),
            "mlflow.note.content": f"{note}\n\n{_describe(running.recipe, size, running.prepared)}",
        },
    )
    return result


def _measured(result: Result) -> dict[str, float]:
    """What is known of its accuracy."""
    low, high = result.val_interval
    accuracy, samples = result.val_accuracy, result.val_samples
    return {"val_accuracy": accuracy, "val_accuracy_low": low, "val_accuracy_high": high, "val_samples": samples}


def _teacher_run(
    recipe: Recipe, teacher: CachedTeacher, splits: Splits, settings: Settings, tracking: Tracking, experiment_id: str
) -> str:
    """The id of the teacher's own run in this store: its accuracy, curves and weights, recorded once."""
    with FileLock(settings.teachers / "run.lock"):  # processes that start together record it once
        for run in tracking.find("teacher", {"kdexp.weights_sha256": teacher.sha256}):
            if run.status == "FINISHED":
                return run.run_id
            if run.status == "RUNNING":  # whoever began it is gone: the lock is ours
                tracking.finish(run.run_id, "KILLED")
        return _record_teacher(recipe, teacher, splits, tracking, experiment_id)


def _record_teacher(recipe: Recipe, teacher: CachedTeacher, splits: Splits, tracking: Tracking, experiment_id: str) -> str:
    low, high = teacher.val_interval
    run_id = tracking.start(
        experiment_id,
        "teacher",
        f"teacher · {_named(recipe.teacher)}",
        params={path: value for path, value in flatten(recipe).items() if path.split(".")[0] in ("data", "teacher")},
        tags={
            "kdexp.weights_sha256": teacher.sha256,
            "mlflow.note.content": (
                f"The teacher ({_named(recipe.teacher)}, {teacher.parameters:,} parameters): **{teacher.val_accuracy:.2%}** "
                f"validation accuracy (95 % interval {low:.2%} to {high:.2%}). Its soft labels train the students "
                f"whose tag `kdexp.teacher_run` names this run."
            ),
        },
    )
    with _closed(run_id, tracking), tempfile.TemporaryDirectory() as temporary:
        now = time.time_ns() // 1_000_000
        named = [{f"epoch/{name}": row[name] for name in row if name != "epoch"} for row in teacher.history]
        epochs = [EpochMetrics(int(row["epoch"]), now, values) for row, values in zip(teacher.history, named, strict=True)]
        tracking.log_epochs(run_id, epochs)
        measured = {"val_accuracy": teacher.val_accuracy, "val_accuracy_low": low, "val_accuracy_high": high}
        tracking.log_metrics(run_id, {"parameters": teacher.parameters, **measured})
        folder = Path(temporary)
        (folder / "config.json").write_text(recipe.model_dump_json(indent=2), "utf-8")
        (folder / "weights.safetensors").symlink_to(teacher.weights.resolve())
        seal(run_id, tracking.log_files(run_id, folder), tracking)
        _log_datasets(tracking, run_id, recipe.data, {"training": splits.train, "validation": splits.validation})
    return run_id


@contextmanager
def _closed(run_id: str, tracking: Tracking) -> Iterator[None]:
    """Close a run on the way out: FINISHED, KILLED where it was interrupted, FAILED with the reason."""
    try:
        yield
        tracking.finish(run_id, "FINISHED")
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | GeneratorExit)
        why = (
            {"kdexp.state": "interrupted"}
            if interrupted
            else {"kdexp.state": "failed", "kdexp.error": without_credentials(str(error))[:500]}
        )
        with tracking.at_once(), suppress(KdexpError):  # where the store is what failed, its error is the one to hear of
            tracking.tag(run_id, why)
            tracking.finish(run_id, "KILLED" if interrupted else "FAILED")
        raise


def _log_datasets(tracking: Tracking, run_id: str, data: Data, splits: Mapping[str, Split]) -> None:
    for role, split in splits.items():
        tracking.log_dataset(run_id, data.dataset, role, split.fingerprint, profile_of(split))


def profile_of(split: Split) -> dict[str, Any]:
    """What a run's record says of a dataset that went into it."""
    return {"samples": len(split), "classes": len(split.classes), "image": [split.channels, *split.image_size]}


def _named(network: Any) -> str:
    """A network in a few characters: 'cnn 16-32-64/128', 'residual 4-8-16', '3 x resnet18'."""
    if getattr(network, "members", 1) > 1:
        return f"{network.members} x {_named(network.model_copy(update={'members': 1}))}"
    if network.channels:
        hidden = f"/{network.hidden}" if network.hidden else ""
        return f"{network.architecture} {'-'.join(map(str, network.channels))}{hidden}"
    return " ".join([network.architecture, *(f"{key}={value}" for key, value in network.options.items())])
