"""Training: a generator of per-epoch reports, one for each lane of a pack. One trial is a pack of
one.

The caller logs, prunes, or stops by closing it; between two epochs it may send new lanes for slots
that have become free. Everything random in epoch e of a lane (order of samples, views, dropout) is
seeded by (the lane's seed, e) alone, so a lane's result depends neither on its neighbours nor on
what ran before, and any epoch can be entered without a saved random state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdexp.config import Data, Training
from kdexp.distill.batches import pixels, rectangles, views
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import BATCH
from kdexp.distill.guard import check_network, check_plan
from kdexp.distill.packs import Drawn, Execution, Lane, Source, fresh, pack_of, plan_for
from kdexp.distill.randomness import seed_of

__all__ = [
    "EPOCH_METRICS",
    "EpochReport",
    "Reports",
    "Snapshot",
    "TeacherLogits",
    "draw",
    "draw_erased",
    "epochs_of",
    "learning_rate",
    "steps_of",
    "train",
    "whole_epochs",
]

ONE_CYCLE_WARMUP = 0.3  # share of the steps; start, peak / 25; end, start / 1e4: torch's OneCycleLR


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's raw logits for the training samples, or for more of which these are some.

    Row v: the logits of every sample in view v. If the training has fewer epochs than there are
    views, row e: every sample in the view that epoch e of this seed draws for it.
    """

    logits: Float[Tensor, "rows samples classes"]
    per: Literal["view", "epoch"] = "view"
    columns: Int64[Tensor, " training"] | None = None
    """Of logits for all images of training and validation: the place of each training image."""

    @property
    def samples(self) -> int:
        """How many training images they are for."""
        return self.logits.shape[1] if self.columns is None else len(self.columns)


@dataclass(frozen=True)
class Snapshot:
    """Where a lane stands after an epoch: all it needs to go on, bit for bit, in its slot of a pack
    of the same form.
    """

    epoch: int
    best: int
    """Correct validation predictions of its best epoch so far."""
    tensors: Mapping[str, Tensor]


def metric() -> Any:
    """A number of each epoch that is recorded under its own name; a run of an earlier version may
    lack it.
    """
    return field(metadata={"metric": True})


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One epoch of one lane. Losses are means over its steps; epochs count from 1."""

    epoch: int
    epochs: int
    loss: float = metric()
    distillation_loss: float = metric()
    student_loss: float = metric()
    val_accuracy: float = metric()
    val_correct: int
    val_loss: float = metric()
    learning_rate: float = metric()
    seconds: float = metric()
    """Of the whole pack."""
    weights: dict[str, Tensor] | None
    """On the CPU, and only where these are the weights to keep so far."""
    bad_step: int | None = None
    """The first optimiser step (from 1) of the training whose loss was NaN or infinite."""
    snapshot: Callable[[], Snapshot] | None = None
    """Takes the lane's snapshot; to be called before the next epoch begins."""

    @property
    def finite(self) -> bool:
        """False where the training has diverged."""
        return math.isfinite(self.loss) and math.isfinite(self.val_loss)

    @property
    def numbers(self) -> EpochReport:
        """Without what is large or lives in this process."""
        return replace(self, weights=None, snapshot=None)


EPOCH_METRICS = tuple(each.name for each in fields(EpochReport) if each.metadata.get("metric"))
"""What is recorded of each epoch."""
Reports = tuple[EpochReport | None, ...]
"""One for each slot of the pack; None where no lane is in training."""


def train(
    lanes: Sequence[Lane | None],
    splits: Splits,
    data: Data,
    teacher: TeacherLogits | None = None,
    how: Execution | None = None,
    dtype: torch.dtype = torch.float32,
    resumed: Sequence[Snapshot | None] = (),
    pulse: Callable[[], object] = lambda: None,
) -> Generator[Reports, Mapping[int, Lane | None] | None, None]:
    """Train the lanes together; after each epoch yield their reports, in the order of their slots.

    `teacher` None trains on the labels alone. Lanes must share their fuse key; None leaves a slot
    empty. A lane with a snapshot in `resumed` goes on from there. What is sent back changes slots
    before the next epoch: a new lane begins there at its epoch 1, None gives the slot up. Ends when
    no lane is left. `pulse` is called before every step; what it raises ends the training.
    """
    present = [lane for lane in lanes if lane]
    if len({lane.fuse_key for lane in present}) != 1:
        raise ValueError("lanes of one pack must share their fuse key")
    how = how or Execution(len(lanes), shared=len({lane.training.seed for lane in present}) == 1)
    _check(present[:2], splits.train, how)  # two: what is wrong between lanes is wrong between any
    together = _Lanes(lanes, splits, views(data.augment), teacher, how, dtype)
    together.pulse = pulse
    together.resume(resumed)
    while together.working:
        changes = yield together.epoch()
        for slot, lane in (changes or {}).items():
            together.change(slot, lane)


def _check(lanes: Sequence[Lane], like: Split, how: Execution) -> None:
    """That these lanes train the network that will be stored. Raises ModelError."""
    network, plan = lanes[0].network, plan_for(lanes[0], like)
    check_network(network, like)
    if plan:
        check_plan(
            [fresh(lane, like) for lane in lanes], plan, how.lowering, like, network.architecture
        )


def draw(
    seed: int, epoch: int, samples: int, views: int
) -> tuple[Int64[Tensor, " samples"], Int64[Tensor, " samples"]]:
    """The order of the samples in an epoch, and the number of each one's view."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(samples, generator=generator), torch.randint(
        views, (samples,), generator=generator
    )


def draw_erased(
    training: Training, epoch: int, samples: int, image_size: tuple[int, int]
) -> Int64[Tensor, "samples 4"] | None:
    """What random erasing takes of each sample in an epoch; None without it."""
    if not training.random_erasing:
        return None
    generator = torch.Generator().manual_seed(seed_of(training.seed, "erased", epoch))
    return rectangles(training.random_erasing, samples, image_size, generator)


@dataclass
class _Slot:
    """A lane in its slot: which epoch it is in, and its best so far. Without a lane its network
    idles along.
    """

    lane: Lane
    idle: bool = False
    epoch: int = 0
    best: int = -1


class _Lanes:
    """The lanes of a pack in training."""

    def __init__(
        self,
        lanes: Sequence[Lane | None],
        splits: Splits,
        views: Int64[Tensor, "views 3"],
        teacher: TeacherLogits | None,
        how: Execution,
        dtype: torch.dtype,
    ) -> None:
        # a network for an empty slot, that idles along
        anyone = next(lane for lane in lanes if lane)
        self.slots = [_Slot(lane or anyone, idle=lane is None) for lane in lanes]
        self.splits, self.teacher, self.how, self.dtype = splits, teacher, how, dtype
        self.pulse: Callable[[], object] = lambda: None
        self.device = splits.train.labels.device
        if teacher and teacher.per == "epoch" and not how.shared:
            raise ValueError("teacher logits by epoch serve lanes that share their mini-batches")
        if teacher and teacher.per == "view" and anyone.training.random_erasing:
            raise ValueError(
                "what is erased differs from epoch to epoch: teacher logits must be by epoch"
            )
        if teacher and teacher.samples != len(splits.train):
            raise ValueError(
                f"teacher logits of {teacher.samples} images, training on {len(splits.train)}"
            )
        by_view = teacher if teacher and teacher.per == "view" else None
        logits, columns = (by_view.logits, by_view.columns) if by_view else (None, None)
        self.source = Source(splits.train, views.to(self.device), logits, columns)
        self.pack = pack_of([slot.lane for slot in self.slots], self.source, how, dtype)
        self.epochs = epochs_of(anyone.training, len(splits.train))

    @property
    def working(self) -> bool:
        """Whether any lane has epochs to go."""
        return any(not slot.idle for slot in self.slots)

    def resume(self, snapshots: Sequence[Snapshot | None]) -> None:
        """Let lanes go on from their snapshots."""
        for at, snapshot in enumerate(snapshots):
            if snapshot:
                slot = self.slots[at]
                self.pack.load(at, snapshot.tensors)
                slot.epoch = snapshot.epoch
                slot.best = snapshot.best
                slot.idle = snapshot.epoch == self.epochs
        together = len({slot.epoch for slot in self.slots if not slot.idle}) <= 1
        if not together and not whole_epochs(self.slots[0].lane.training, len(self.splits.train)):
            raise ValueError("with a last epoch cut short by max_steps, lanes are in one epoch")
        if self.how.shared:
            if not together:
                raise ValueError("lanes that share their mini-batches are in one epoch")
            for slot in self.slots:  # also an empty slot draws along
                slot.epoch = max(slot.epoch for slot in self.slots)

    def change(self, at: int, lane: Lane | None) -> None:
        """Put a new lane in a slot, or give the slot up."""
        if lane is None:
            self.slots[at].idle = True
            return
        if self.how.shared:
            raise ValueError("lanes that share their mini-batches start together")
        if lane.fuse_key != self.slots[at].lane.fuse_key:
            raise ValueError("lanes of one pack must share their fuse key")
        if not whole_epochs(lane.training, len(self.splits.train)):
            raise ValueError("with a last epoch cut short by max_steps, lanes start together")
        self.slots[at] = _Slot(lane)
        self.pack.put(at, lane)

    def epoch(self) -> Reports:
        """Every lane's next epoch, then its evaluation on validation."""
        started = time.perf_counter()
        working = [slot for slot in self.slots if not slot.idle]
        for slot in self.slots:
            slot.epoch = min(slot.epoch + 1, self.epochs)  # an idle network repeats its last
        if self.teacher and self.teacher.per == "epoch":
            row = self.teacher.logits[self.slots[0].epoch - 1]
            self.pack.source = replace(
                self.source, logits=row.expand(len(self.source.views), -1, -1)
            )
        losses, rates, bad = self._steps(max(slot.epoch for slot in working))
        correct, val_losses = self._evaluate()
        seconds = time.perf_counter() - started
        columns = zip(self.slots, losses.T.tolist(), rates, bad, correct, val_losses, strict=True)
        return tuple(self._report(at, seconds, *values) for at, values in enumerate(columns))

    def _report(
        self,
        at: int,
        seconds: float,
        slot: _Slot,
        losses: list[float],
        rate: float,
        bad: int | None,
        correct: int,
        val_loss: float,
    ) -> EpochReport | None:
        if slot.idle:
            return None
        keep = correct > slot.best if slot.lane.training.keep == "best" else True
        slot.best = max(slot.best, correct)
        slot.idle = slot.epoch == self.epochs
        total, distillation, student = losses
        return EpochReport(
            epoch=slot.epoch,
            epochs=self.epochs,
            loss=total,
            distillation_loss=distillation,
            student_loss=student,
            val_accuracy=correct / len(self.splits.validation),
            val_correct=correct,
            val_loss=val_loss,
            learning_rate=rate,
            seconds=seconds,
            weights=self.pack.state(at) if keep else None,
            bad_step=bad,
            snapshot=lambda: Snapshot(slot.epoch, slot.best, self.pack.save(at)),
        )

    def _steps(self, latest: int) -> tuple[Float[Tensor, "3 lanes"], list[float], list[int | None]]:
        """The epoch's optimiser steps: mean losses (total, distillation, student), last learning
        rates, first bad steps.

        `latest` of the epochs that lanes in training are in: the last one may be cut short.
        """
        training, samples = self.slots[0].lane.training, len(self.splits.train)
        size, total = min(training.batch_size, samples), steps_of(training, samples)
        first = [(slot.epoch - 1) * _steps_per_epoch(training, samples) for slot in self.slots]
        count = min(
            _steps_per_epoch(training, samples),
            total - (latest - 1) * _steps_per_epoch(training, samples),
        )
        drawn = self._draw()
        rates = [
            [
                learning_rate(slot.lane.training, start + step, total)
                for start, slot in zip(first, self.slots, strict=True)
            ]
            for step in range(count)
        ]
        on_device = torch.tensor(rates, dtype=self.dtype, device=self.device)
        steps = torch.tensor(first, device=self.device)
        losses = torch.zeros(count, 3, len(self.slots), dtype=self.dtype, device=self.device)
        for step in range(count):
            self.pulse()
            loss = self.pack.step(_batch(drawn, step * size, size), on_device[step], steps + step)
            torch.stack(loss, out=losses[step])  # on the device: no .item() in the loop
        bad = [
            _first(column, at)
            for column, at in zip(~losses[:, 0].isfinite().T.cpu(), first, strict=True)
        ]
        return losses.double().mean(0), rates[-1], bad

    def _draw(self) -> Drawn:
        """This epoch's order of the samples, and each one's view and erased part; once for all
        where lanes share them.
        """
        slots, train = self.slots[:1] if self.how.shared else self.slots, self.splits.train
        counts = len(train), len(self.source.views)
        each = [draw(slot.lane.training.seed, slot.epoch, *counts) for slot in slots]
        order, chosen = (torch.stack(parts).to(self.device) for parts in zip(*each, strict=True))
        parts = [
            draw_erased(slot.lane.training, slot.epoch, len(train), train.image_size)
            for slot in slots
        ]
        erased = None if parts[0] is None else torch.stack(parts).to(self.device)  # type: ignore[arg-type]
        drawn = Drawn(order, chosen, erased)
        if not self.how.shared:
            return drawn
        return Drawn(*(None if part is None else part[0] for part in drawn))  # type: ignore[arg-type]

    def _evaluate(self) -> tuple[list[int], list[float]]:
        """Each lane's correct predictions and mean cross-entropy on validation."""
        split: Split = self.splits.validation
        correct = torch.zeros(len(self.slots), dtype=torch.int64, device=self.device)
        loss = torch.zeros(len(self.slots), dtype=torch.float64, device=self.device)
        for samples in torch.arange(len(split), device=self.device).split(BATCH):
            labels = split.labels[samples].expand(len(self.slots), -1)
            logits = self.pack.logits(pixels(split, samples))
            correct += (logits.argmax(-1) == labels).sum(-1)
            loss += (
                F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double().sum(-1)
            )
        return correct.tolist(), (loss / len(split)).tolist()


def epochs_of(training: Training, samples: int) -> int:
    """How many epochs a training takes: `epochs`, or fewer under `max_steps`."""
    return math.ceil(steps_of(training, samples) / _steps_per_epoch(training, samples))


def whole_epochs(training: Training, samples: int) -> bool:
    """Whether `max_steps` leaves the last epoch whole."""
    return steps_of(training, samples) % _steps_per_epoch(training, samples) == 0


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The learning rate of step 0 ... steps - 1.

    cosine: SGDR's annealing, arXiv:1608.03983 eq. 5, one period; one_cycle: arXiv:1708.07120 as in
    torch.
    """
    peak, end = training.learning_rate, min(training.final_learning_rate, training.learning_rate)
    if training.schedule == "constant":
        return peak
    if training.schedule == "cosine":
        return _anneal(peak, end, step / steps)
    start, turn = peak / 25, ONE_CYCLE_WARMUP * steps - 1
    if step <= turn:
        return _anneal(start, peak, step / turn)
    return _anneal(peak, start / 1e4, (step - turn) / max(steps - 1 - turn, 1e-9))


def _batch(drawn: Drawn, start: int, size: int) -> Drawn:
    """So many samples of an epoch's order, from the place `start` on, with what is drawn for each
    of them.
    """
    samples = drawn.samples[..., start : start + size]
    erased = drawn.erased
    if erased is not None:
        erased = erased.gather(-2, samples[..., None].expand(*samples.shape, 4))
    return Drawn(samples, drawn.views.gather(-1, samples), erased)


def _first(bad: Bool[Tensor, " steps"], begun: int) -> int | None:
    """The number of the first bad step in a training that had `begun` steps before."""
    return begun + int(bad.nonzero()[0]) + 1 if bad.any() else None


def _steps_per_epoch(training: Training, samples: int) -> int:
    # Whole batches only: every step has the same shape, and no batch of one reaches BatchNorm.
    return max(samples // training.batch_size, 1)


def steps_of(training: Training, samples: int) -> int:
    """How many optimiser steps a training takes."""
    steps = training.epochs * _steps_per_epoch(training, samples)
    return min(steps, training.max_steps or steps)


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
