"""The MLflow run of one training: recorded before its first step, filled as it goes, closed at its
end.

Trials, fresh seeds, `train` and `reproduce` all record through here, so what one records another
can rebuild. Nothing here trains: a worker does (work.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdexp import KdexpError
from kdexp.config import Data, Recipe, Selection, flatten
from kdexp.distill.checkpoints import Checkpoint, Checkpoints
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.execution import choose, compiles
from kdexp.distill.models import Size, measure, outline, summary, weights_hash
from kdexp.distill.packs import Execution, Lane
from kdexp.distill.train import EPOCH_METRICS, EpochReport
from kdexp.environment import record
from kdexp.runs import describe
from kdexp.runs.bench import Bench
from kdexp.runs.describe import InStudy
from kdexp.runs.outcome import Outcome
from kdexp.runs.plots import colour, curves, save
from kdexp.runs.records import INPUT, input_text, seal
from kdexp.runs.tracking import EpochMetrics, Kind, Tracking, TrackingAway
from kdexp.selection import clears
from kdexp.settings import without_credentials
from kdexp.workers.pool import Died, Pool, PoolSize
from kdexp.workers.work import Broke, Ended, Epoch, Job, Measured, Prepared, Row, Task

__all__ = [
    "ALL_IMAGES",
    "LOGITS_OF",
    "Entry",
    "Form",
    "Recording",
    "begin",
    "close_run",
    "closed",
    "environment_of",
    "facts",
    "goes_on_here",
    "log_datasets",
    "profile_of",
    "recorded",
    "which_logits",
]

DELIVER_SECONDS = 30.0
"""An epoch's record costs MLflow 15 ms: a thousandth of an epoch that long, and batches of short
ones.
"""
LOGITS_OF, ALL_IMAGES = "kdexp.logits_of", "all images"
"""The tag of a training whose teacher's logits were cached for every fold; absent: for its own
training images alone.
"""
ELSEWHERE = ("threads", "commit", "source")
"""A training that goes on sets its own threads; of the package its bits depend on the core
alone.
"""


@dataclass(frozen=True)
class Entry:
    """How a run is filed: its kind, its name, and what finds it."""

    kind: Kind
    name: str
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    study: InStudy | None = None
    """What a trial is held against."""


@dataclass(frozen=True)
class Form:
    """How a training is carried out: alone or in which slot of a pack, by so many CPU threads."""

    execution: Execution
    slot: int
    threads: int

    @classmethod
    def alone(cls, recipe: Recipe, like: Split) -> Form:
        """A training of its own, as this process would do it."""
        return cls(choose([Lane.of(recipe)], like), 0, torch.get_num_threads())

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Form:
        """As it was recorded. Raises ValueError, KeyError or StopIteration where that makes no
        sense.
        """
        execution, slot = Execution.recorded(environment)
        return cls(execution, slot, int(environment["threads"]))


@dataclass
class Recording:
    """The run of a training under way, and what of it MLflow does not have yet."""

    run_id: str
    recipe: Recipe
    prepared: Prepared
    bench: Bench
    form: Form
    environment: Mapping[str, str]
    size: Size
    history: list[Row] = field(default_factory=list)
    safe: int = 0
    """So many epochs of the history are in a checkpoint, or need none ..."""
    sent: int = 0
    """... and so many are with MLflow."""
    delivered: float = float("-inf")
    ended: Ended | None = None
    outcome: Outcome | None = None
    study: InStudy | None = None
    """What it is held against."""

    def take(self, epoch: Epoch) -> None:
        """Take note of an epoch. MLflow is sent its share now and then, if it answers at once."""
        self.history.append(epoch.row)
        self.safe = epoch.safe
        now = time.monotonic()
        if now - self.delivered >= DELIVER_SECONDS:
            self.delivered = now
            with self.bench.tracking.at_once(), suppress(TrackingAway):
                self.deliver()

    def deliver(self) -> None:
        """Send what MLflow does not have. What it has already, it stores once."""
        due = [
            EpochMetrics(
                int(row["epoch"]),
                int(row["time_ms"]),
                {f"epoch/{name}": row[name] for name in EPOCH_METRICS},
            )
            for row in self.history[self.sent : self.safe]
        ]
        self.bench.tracking.log_epochs(self.run_id, due)
        self.sent = self.safe

    def conclude(self, ended: Ended) -> Outcome:
        """Record what came of the training: metrics, weights and curves. The run is then
        finished.
        """
        self.safe = len(self.history)
        self.deliver()
        outcome = _conclude(self, ended)
        self.bench.tracking.finish(self.run_id, "FINISHED")
        self.outcome = outcome
        return outcome

    def close(self, error: BaseException | str | None) -> None:
        """Close the run of a training that did not end: KILLED where it was interrupted, else
        FAILED with the reason.

        One that is finished stays so. Where the store is what failed, its own error is the one to
        hear of.
        """
        if self.outcome:
            return
        tracking = self.bench.tracking
        with tracking.at_once(), suppress(KdexpError):
            self.deliver()
        with tracking.at_once(), suppress(KdexpError):
            close_run(self.run_id, error, tracking)

    def drop(self) -> None:
        """Close the run of a training that is not accepted, whatever came of it."""
        self.outcome = None
        self.close(None)

    @property
    def curve(self) -> list[float]:
        """Validation accuracy of each epoch so far."""
        return [row["val_accuracy"] for row in self.history]

    def epochs(
        self,
        checkpoints: Checkpoints | None = None,
        name: str = "",
        resumed: bool = False,
        last: int | None = None,
    ) -> Iterator[EpochReport]:
        """Train this recipe alone, by a worker of this process, and record every epoch.

        One that was recorded as a lane of a pack has copies in the other lanes, so that the bits
        match.

        With `name` its checkpoints are kept; `last` is the epoch after which it ends as one that is
        pruned.
        """
        form = self.form
        task = Task(self.run_id, self.recipe, self.environment, name, resumed, last=last)
        others = range(form.execution.lanes)  # the other lanes of a pack are copies
        tasks = {slot: task if slot == form.slot else _copy(task) for slot in others}
        folder = checkpoints.folder if checkpoints else None
        job = Job(0, tasks, form.execution, form.threads, folder)
        with Pool(PoolSize(1, form.threads), self.prepared, str(self.bench.device)) as pool:
            pool.workers[0].give(job)
            while True:
                match pool.receive()[1]:
                    case Measured(epochs=epochs) if form.slot in epochs:
                        self.take(epochs[form.slot])
                        yield epochs[form.slot].report
                    case Ended(slot=form.slot) as ended:
                        self.ended = ended
                        return
                    case Broke(error=error):
                        assert error is not None
                        raise error
                    case Died(why=why):
                        raise KdexpError(f"The training ended: {why}")


def _copy(task: Task) -> Task:
    return replace(task, run_id="", keeps=False)


def begin(
    recipe: Recipe,
    prepared: Prepared,
    bench: Bench,
    entry: Entry,
    form: Form,
    resumed: Checkpoint | None = None,
) -> Recording:
    """A run for a training, whole on record before its first step; with `resumed` that checkpoint's
    run goes on.
    """
    tracking, split = bench.tracking, prepared.splits.train
    module = outline(recipe.student, split)
    size = measure(module, split)
    if resumed:
        history = list[Row](resumed.history)
        run_id = resumed.run_id
        tracking.finish(run_id, "RUNNING")
        again = {
            "kdexp.state": "",
            "kdexp.error": "",
            "kdexp.resumed_from_epoch": str(resumed.snapshot.epoch),
        }
        tracking.tag(run_id, again)
        recording = Recording(
            run_id,
            recipe,
            prepared,
            bench,
            form,
            resumed.environment,
            size,
            history,
            study=entry.study,
        )
        recording.safe = len(history)
        return recording
    environment = environment_of(recipe, prepared, form)
    run_id = tracking.start(
        bench.experiment_id,
        entry.kind,
        entry.name,
        params={**flatten(recipe), **entry.params},
        tags={
            "kdexp.teacher_run": prepared.teacher_run,
            **which_logits(prepared),
            **facts(prepared),
            "mlflow.note.content": describe.of_training(recipe, size, prepared.teacher),
            **entry.tags,
        },
        parent=entry.parent,
    )
    recording = Recording(
        run_id, recipe, prepared, bench, form, environment, size, study=entry.study
    )
    try:
        _log_record(recording, summary(module, split))
    except BaseException as error:
        recording.close(error)
        raise
    return recording


@contextmanager
def recorded(
    recipe: Recipe,
    prepared: Prepared,
    bench: Bench,
    entry: Entry,
    form: Form | None = None,
    resumed: Checkpoint | None = None,
) -> Iterator[Recording]:
    """A run around one training: iterate its `epochs()`. Closed after it, whatever happens in
    between.

    Left normally: FINISHED, with the `outcome`. Interrupted: KILLED. Failed: FAILED.
    """
    form = form or Form.alone(recipe, prepared.splits.train)
    recording = begin(recipe, prepared, bench, entry, form, resumed)
    try:
        yield recording
        assert recording.ended is not None
        recording.conclude(recording.ended)
    except BaseException as error:
        recording.close(error)
        raise


@contextmanager
def closed(run_id: str, tracking: Tracking) -> Iterator[None]:
    """Close a run on the way out: FINISHED, KILLED where it was interrupted, FAILED with the
    reason.
    """
    try:
        yield
        tracking.finish(run_id, "FINISHED")
    except BaseException as error:
        # where the store failed, its error is the one to hear of
        with tracking.at_once(), suppress(KdexpError):
            close_run(run_id, error, tracking)
        raise


def close_run(run_id: str, error: BaseException | str | None, tracking: Tracking) -> None:
    """Close a run that did not end: KILLED where it was interrupted (or no error is given), else
    FAILED with the reason.
    """
    interrupted = error is None or isinstance(error, KeyboardInterrupt | GeneratorExit)
    if interrupted:
        tracking.tag(run_id, {"kdexp.state": "interrupted"})
    else:
        why = without_credentials(str(error))[:500]
        tracking.tag(run_id, {"kdexp.state": "failed", "kdexp.error": why})
    tracking.finish(run_id, "KILLED" if interrupted else "FAILED")


def facts(prepared: Prepared) -> dict[str, str]:
    """SHA-256 of data and teacher, by the tags that record them."""
    return {
        "kdexp.teacher_sha256": prepared.teacher.sha256,
        "kdexp.logits_sha256": prepared.teacher.logits_sha256,
        "kdexp.train_sha256": prepared.splits.train.fingerprint,
        "kdexp.validation_sha256": prepared.splits.validation.fingerprint,
    }


def which_logits(prepared: Prepared) -> dict[str, str]:
    """Which logits of its teacher a training has, by the tags that record it: another cache was
    computed in other batches.
    """
    per = {"kdexp.logits_per": prepared.teacher.soft.per}
    return per | ({LOGITS_OF: ALL_IMAGES} if prepared.teacher.of_all_images else {})


def environment_of(recipe: Recipe, prepared: Prepared, form: Form) -> dict[str, str]:
    """All that a training's last bits depend on here besides its recipe, as text by name."""
    machine = record(prepared.splits.train.labels.device.type, recipe, form.threads)
    logits = {"soft labels": prepared.teacher.logits_sha256[:16]}
    return {**machine, **logits, **form.execution.record(form.slot)}


def goes_on_here(checkpoint: Checkpoint, recipe: Recipe, prepared: Prepared) -> bool:
    """Whether a training that goes on here from its checkpoint ends as it would have ended
    unbroken.
    """
    then = checkpoint.environment
    here = environment_of(recipe, prepared, Form.of(then))
    same = all(then.get(name) == value for name, value in here.items() if name not in ELSEWHERE)
    return same and (then["compiled"] == "no" or compiles(str(prepared.splits.train.labels.device)))


def _log_record(recording: Recording, summary: str) -> None:
    """What makes a run reproducible, before its first step."""
    tracking, run_id, recipe = recording.bench.tracking, recording.run_id, recording.recipe
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(recipe.model_dump_json(indent=2), "utf-8")
        (folder / "environment.json").write_text(
            json.dumps(recording.environment, indent=2), "utf-8"
        )
        (folder / "model_summary.txt").write_text(summary, "utf-8")
        (folder / INPUT).write_text(input_text(recording.prepared.splits.train), "utf-8")
        seal(run_id, tracking.log_files(run_id, folder), tracking)
    log_datasets(run_id, recipe.data, recording.prepared.splits, tracking)


def _conclude(recording: Recording, ended: Ended) -> Outcome:
    """Final metrics, weights and curves on the run."""
    tracking, run_id, recipe = recording.bench.tracking, recording.run_id, recording.recipe
    teacher, size, study = recording.prepared.teacher, recording.size, recording.study
    samples = len(recording.prepared.splits.validation)
    outcome = Outcome(
        run_id,
        ended.state,
        size,
        ended.correct / samples,
        samples,
        ended.kept_epoch,
        len(recording.history),
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if ended.weights:
            save_file(dict(ended.weights), folder / "weights.safetensors")
        title = f"{describe.named(recipe.student)}, {size.parameters:,} parameters"
        save(curves(recording.history, title, outcome.kept_epoch), folder / "curves.png")
        seal(run_id, tracking.log_files(run_id, folder), tracking)
    held_out = not recipe.data.train_on_validation
    tracking.log_metrics(
        run_id,
        {
            **size.metrics,
            **(_measured(outcome) if held_out else {}),
            "kept_epoch": outcome.kept_epoch,
            "epochs_trained": outcome.epochs,
            "train_seconds": sum(row["seconds"] for row in recording.history),
            "teacher_val_accuracy": teacher.val_accuracy,
        },
        time_ms=int(recording.history[-1]["time_ms"]) if recording.history else None,
    )
    diverged = {"kdexp.bad_step": str(ended.bad_step)} if ended.state == "diverged" else {}
    tracking.tag(
        run_id,
        {
            "kdexp.state": ended.state,
            "kdexp.weights_sha256": weights_hash(ended.weights) if ended.weights else "",
            **diverged,
            **(_coloured(outcome, study.rule) if study else {}),
            "mlflow.note.content": describe.concluded(
                outcome, recipe, ended.bad_step, teacher, study
            ),
        },
    )
    return outcome


def _coloured(outcome: Outcome, rule: Selection) -> dict[str, str]:
    return colour(clears(outcome.val_accuracy, outcome.val_samples, rule))


def _measured(outcome: Outcome) -> dict[str, float]:
    """What is known of its accuracy."""
    low, high = outcome.val_interval
    return {
        "val_accuracy": outcome.val_accuracy,
        "val_accuracy_low": low,
        "val_accuracy_high": high,
        "val_samples": outcome.val_samples,
    }


def log_datasets(run_id: str, data: Data, splits: Splits, tracking: Tracking) -> None:
    """The data sets that went into a run."""
    for role, split in (("training", splits.train), ("validation", splits.validation)):
        tracking.log_dataset(run_id, data.dataset, role, split.fingerprint, profile_of(split))


def profile_of(split: Split) -> dict[str, Any]:
    """What a run's record says of a dataset that went into it."""
    return {
        "samples": len(split),
        "classes": len(split.classes),
        "image": [split.channels, *split.image_size],
    }
