"""What a sweep of a file would do, without doing it: its images, teacher, students, and how long it
takes here.

Times rest on real steps that are timed now (`kdexp.workers.rehearsal`), on a training recorded in
stores that are thrown away, and on this:

    one training   begin + steps x step + epochs x evaluation
    the trials     N workers and one scheduler, who proposes and records, as a closed queue: by mean
                   value analysis (Reiser & Lavenberg 1980, J. ACM 27:313)
    teachers       members x (begin + steps x step + epochs x evaluation), then each view of each
                   image once; for every fold that is held out, unless one serves all
    the study      start + teachers + trials + selection

Nothing is recorded and nothing stays on disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from kdexp.config import Sweep, Training
from kdexp.distill.batches import views
from kdexp.distill.datasets import Inspection, Splits, count_test
from kdexp.distill.evaluate import BATCH
from kdexp.distill.execution import choose
from kdexp.distill.guard import check_network
from kdexp.distill.models import Size, layout_of, measure
from kdexp.distill.packs import Execution, Lane, Source
from kdexp.distill.teacher import Missing, lane_of, last_epoch, missing, network_of
from kdexp.distill.train import epochs_of, steps_of
from kdexp.runs.prepare import read_images
from kdexp.runs.rehearsed import Recorded, rehearse_recording
from kdexp.runs.schema import schema_of
from kdexp.search.sizes import Sized, Sizes, sizes_of
from kdexp.search.storage import OPTUNA, open_storage
from kdexp.search.study import Begun, check_search, check_study, proposal_seconds
from kdexp.search.sweep import (
    check_judging,
    is_whole,
    pack_size,
    shared_training,
    students_to_try,
)
from kdexp.settings import Settings
from kdexp.workers.pool import PoolSize, pool_size
from kdexp.workers.processes import warm_up
from kdexp.workers.rehearsal import Pace, Rehearsal, few, pace, pass_seconds, side_by_side
from kdexp.workers.work import FOLDS_KEPT

__all__ = [
    "Check",
    "Images",
    "Looked",
    "OneTraining",
    "Study",
    "Teaching",
    "check",
    "trial_seconds",
]

SELECTION = 12  # times as long as a record: a model exported, registered, looked at on test
BUSY = 0.75  # of the cores, in the last minute
SEARCHED = ("training.epochs", "training.max_steps", "training.batch_size")


@dataclass(frozen=True)
class Looked:
    """What is being measured, for those who wait."""

    what: str


@dataclass(frozen=True)
class Images:
    """The data set."""

    training: int
    validation: int
    test: int
    size: tuple[int, int]
    channels: int
    classes: tuple[str, ...]
    smallest: str
    """The class with the fewest training images ..."""
    fewest: int
    """... which are so many."""


@dataclass(frozen=True)
class Teaching:
    """What the teachers of a study take."""

    size: Size
    networks: int
    """To be trained for the fold that trial 0 holds out; 0: it is there, or given."""
    passes: int
    """Images that go through it for its logits."""
    seconds: float
    """Both together."""
    others: int
    """Folds whose teacher is not there, of those that repeats may hold out at most."""
    other_seconds: float
    """For all of these."""
    step: float | None
    """One step of its training; None where none is trained."""


@dataclass(frozen=True)
class OneTraining:
    """One training of a student here, or of a pack of them."""

    sized: Sized
    how: Execution
    steps: int
    epochs: int
    pace: Pace
    seconds: float


@dataclass(frozen=True)
class Study:
    """Seconds of a whole study."""

    start: float
    trials: tuple[float, float, float]
    """Of the trials: all as the smallest student, in the middle, all as the largest."""
    least: float
    """All together, where repeats hold out no other fold."""
    most: float
    """All together, where they hold out all that they may."""


@dataclass(frozen=True)
class Check:
    """What a sweep would do."""

    sweep: Sweep
    done: int
    """Trials of a study of this name that have ended."""
    images: Images
    teaching: Teaching
    sizes: Sizes
    pool: PoolSize
    pack: int
    smallest: OneTraining
    largest: OneTraining
    record: float
    """Seconds to record a training."""
    proposal: float
    memory: int
    """Bytes of one worker at its peak: measured on a few images, and those of all added."""
    study: Study
    notes: tuple[str, ...]

    @property
    def ends_early(self) -> bool:
        """Whether trials may end before their last epoch: times are then the most that it takes."""
        return self.sweep.study.early_stop or self.sweep.study.pruner != "none"


def check(
    sweep: Sweep, settings: Settings, device: torch.device, imports: float
) -> Generator[Inspection | Looked, None, Check]:
    """Look, build and time. `imports`: seconds that this process took to import what a sweep does.

    Raises what a sweep would, before it trains anything.
    """
    check_search(sweep)
    busy = _busy()
    begun = _begun(sweep, settings)
    sweep, done = (begun.sweep, begun.done) if begun else (sweep, 0)
    left = max(sweep.study.trials - done, 0)
    pool = pool_size(settings, device, max(left, 1))
    if pool.workers > 1:
        warm_up()
    yield Looked("images")
    started = time.perf_counter()
    students, losses = students_to_try(sweep), sweep.losses
    splits = yield from read_images(sweep.recipe, settings, device, students, None, losses)
    reading = time.perf_counter() - started
    check_judging(sweep, splits)
    images = _images(sweep, splits, settings)
    yield Looked("students")
    sizes = sizes_of(sweep, splits.train)
    source = Source(splits.train, views(sweep.data.augment).to(device), None)
    pack = max(min(pack_size(sweep, settings, source, pool, max(left, 1)), max(left, 1)), 1)
    yield Looked("teacher")
    teaching = _teaching(sweep, settings, device, splits, reading)
    yield Looked("steps")
    ends = (sizes.smallest, sizes.largest)
    rehearsals = [_rehearsal(one, pack, splits) for one in ends]
    paces, workers = side_by_side(rehearsals, pool.workers, pool.threads, str(device))
    smallest, largest = (
        _one_training(one, rehearsal, found, splits)
        for one, rehearsal, found in zip(ends, rehearsals, paces, strict=True)
    )
    yield Looked("records")
    recorded = rehearse_recording(
        sweep.recipe, splits.to(torch.device("cpu")), epochs_of(sweep.training, len(splits.train))
    )
    proposal = proposal_seconds(sweep, max(2 * sweep.study.trials // 3, 1))
    once = sum(found.cold for found in paces) + (0 if _has_store(settings) else recorded.store)
    start = imports + reading + workers + once + (0 if begun else _storage_seconds())
    study = _study(start, teaching, (smallest, largest), pool, pack, left, recorded, proposal)
    memory = max(found.memory for found in paces) + _bytes(sweep, splits, pool)
    return Check(
        sweep,
        done,
        images,
        teaching,
        sizes,
        pool,
        pack,
        smallest,
        largest,
        recorded.training,
        proposal,
        memory,
        study,
        (*busy, *_notes(sweep, settings)),
    )


def _begun(sweep: Sweep, settings: Settings) -> Begun | None:
    """The study of this name, if there is one; no store is made to look for it."""
    if settings.storage:
        there = schema_of(settings.storage_url, OPTUNA).age != "new"
    else:
        there = (settings.stores / "optuna.db").exists()
    return check_study(sweep, settings) if there else None


def _has_store(settings: Settings) -> bool:
    return settings.tracking_uri is not None or (settings.stores / "mlflow.db").exists()


def _storage_seconds() -> float:
    """What making a study's storage takes: one is made, and thrown away."""
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        open_storage(Settings(stores=Path(temporary))).engine.dispose()
        return time.perf_counter() - started


def _images(sweep: Sweep, splits: Splits, settings: Settings) -> Images:
    train = splits.train
    counts = Counter(train.labels.tolist())
    fewest = min(range(len(train.classes)), key=lambda label: counts[label])
    return Images(
        len(train),
        len(splits.validation),
        count_test(sweep.data, splits, settings.data_dir),
        train.image_size,
        train.channels,
        train.classes,
        train.classes[fewest],
        counts[fewest],
    )


# --- teachers ---


def _teaching(
    sweep: Sweep, settings: Settings, device: torch.device, splits: Splits, reading: float
) -> Teaching:
    """The teacher of fold 0, and those of the folds that repeats hold out."""
    recipe, folder = sweep.recipe, settings.teachers
    training, whole = shared_training(sweep, settings, device), is_whole(sweep)
    first = missing(recipe.teacher, recipe.data, splits, folder, training, whole)
    others = _of_other_folds(sweep, settings, splits, training, whole)
    module = network_of(recipe.teacher, splits.train)
    module.to(device, memory_format=layout_of(module))  # type: ignore[call-overload]
    size, step, network = measure(module, splits.train), None, 0.0
    if first.trainings or any(one.trainings for one in others):
        check_network(recipe.teacher, splits.train)
        step, network = _network_seconds(sweep, splits)
    image = pass_seconds(module.eval(), splits.train) if first.passes or others else 0.0

    def seconds(one: Missing) -> float:
        return one.trainings * network + one.passes * image

    again = sum(seconds(one) + reading for one in others)
    taken = first.trainings, first.passes, seconds(first)
    return Teaching(size, *taken, len(others), again, step)


def _of_other_folds(
    sweep: Sweep, settings: Settings, splits: Splits, training: Training | None, whole: bool
) -> list[Missing]:
    """What the teachers of the other folds lack that repeats may hold out."""
    if not sweep.repeats or whole:
        return []
    most = min(sweep.study.repeats - 1, sweep.study.trials - 1)
    folds = {(sweep.data.fold + repeat) % splits.folds for repeat in range(1, most + 1)}
    found = []
    for fold in sorted(folds - {sweep.data.fold}):
        data = sweep.data.model_copy(update={"fold": fold})
        cut = splits.cut_by(data)
        found.append(missing(sweep.teacher, data, cut, settings.teachers, training, whole))
    return [one for one in found if one.trainings or one.passes]


def _network_seconds(sweep: Sweep, splits: Splits) -> tuple[float, float]:
    """A step of one network of the teacher, and its whole training, in this process as in a
    sweep.
    """
    teacher, lane = sweep.teacher, lane_of(sweep.teacher)
    how, some = choose([lane], splits.train), few(splits, teacher.batch_size)
    found = pace(Rehearsal((lane,), how, sweep.data, some, distils=False))
    epochs = last_epoch(teacher, len(splits.train))
    share = epochs / epochs_of(teacher, len(splits.train))
    steps = round(share * steps_of(teacher, len(splits.train)))
    seconds = training_seconds(found, steps, epochs, len(splits.validation))
    return found.step, seconds


# --- students ---


def _rehearsal(one: Sized, pack: int, splits: Splits) -> Rehearsal:
    lanes = (Lane.of(one.recipe),) * pack
    how = choose(lanes, splits.train)
    return Rehearsal(lanes, how, one.recipe.data, few(splits, lanes[0].training.batch_size), True)


def _one_training(one: Sized, rehearsal: Rehearsal, found: Pace, splits: Splits) -> OneTraining:
    training, samples = one.recipe.training, len(splits.train)
    steps, epochs = steps_of(training, samples), epochs_of(training, samples)
    seconds = training_seconds(found, steps, epochs, len(splits.validation))
    return OneTraining(one, rehearsal.how, steps, epochs, found, seconds)


def training_seconds(pace: Pace, steps: int, epochs: int, validation: int) -> float:
    """A whole training: begun once, evaluated after each epoch and once more at its end."""
    return pace.begin + steps * pace.step + (epochs + 1) * pace.batch * validation / BATCH


# --- the study ---


def _study(
    start: float,
    teaching: Teaching,
    ends: tuple[OneTraining, OneTraining],
    pool: PoolSize,
    pack: int,
    left: int,
    recorded: Recorded,
    proposal: float,
) -> Study:
    low, high = sorted(one.seconds for one in ends)
    scheduler = recorded.training + proposal
    low, middle, high = (
        left * trial_seconds(job / pack, scheduler, pool.workers)
        for job in (low, (low + high) / 2, high)
    )
    if not left:
        return Study(start, (0.0, 0.0, 0.0), 0.0, 0.0)
    fixed = start + teaching.seconds + SELECTION * recorded.training
    return Study(
        start, (low, middle, high), fixed + middle, fixed + middle + teaching.other_seconds
    )


def trial_seconds(training: float, scheduler: float, workers: int) -> float:
    """Seconds from the end of one trial to the end of the next: each is `scheduler` seconds with
    the one who proposes and records, and `training` seconds with one of so many workers.
    """
    queue = 0.0
    cycle = 0.0
    for customers in range(1, workers + 1):
        waits = scheduler * (1 + queue)
        cycle = (training + waits) / customers
        queue = waits / cycle if cycle else 0.0
    return cycle


def _bytes(sweep: Sweep, splits: Splits, pool: PoolSize) -> int:
    """Of the images, which each worker process has for itself, and again for the folds that it
    keeps.
    """
    tensors = (splits.train.images, splits.validation.images)
    once = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    folds = min(splits.folds - 1, FOLDS_KEPT) if sweep.repeats else 0
    return once * (folds + (pool.workers > 1))


def _busy() -> tuple[str, ...]:
    """That other work takes this machine's cores now, if it does: before there is any of ours."""
    if not hasattr(os, "getloadavg"):  # Windows
        return ()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return ()
    return (
        f"other work keeps this machine busy (load {load:.1f} on {cores} cores): times are beside"
        " it, and waver with it",
    )


def _notes(sweep: Sweep, settings: Settings) -> tuple[str, ...]:
    notes = []
    searched = [path for path in SEARCHED if path in sweep.search]
    if searched:
        notes.append(f"{', '.join(searched)} searched over: times are for the file's own values")
    if settings.tracking_uri or settings.storage:
        notes.append("servers of your own answer in times of their own: not in the estimate")
    return tuple(notes)
