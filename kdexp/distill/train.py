"""Training: a generator of per-epoch reports, one for each lane of a pack. One trial is a pack of one.

The caller logs, prunes, or stops by closing the generator. Everything random in epoch e of a lane (order of
samples, views, dropout) is seeded by (the lane's seed, e) alone, so a lane's result depends neither on its
neighbours nor on what ran before, and any epoch can be entered without a saved random state.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdexp.config import Data, Distillation, Network, Recipe, Training
from kdexp.distill.data import Splits, pixels, views
from kdexp.distill.evaluate import evaluate
from kdexp.distill.losses import Loss, distillation_loss
from kdexp.distill.models import build

__all__ = ["EpochReport", "Lane", "epochs_of", "learning_rate", "seed_of", "train"]

ONE_CYCLE_WARMUP = 0.3  # share of the steps; start, peak / 25; end, start / 1e4: torch's OneCycleLR


@dataclass(frozen=True)
class Lane:
    """One network to train and how. Lanes of a pack agree in `fuse_key`; what is not in it may differ."""

    network: Network
    training: Training
    distillation: Distillation

    @classmethod
    def of(cls, recipe: Recipe) -> Lane:
        """The student of a recipe."""
        return cls(recipe.student, recipe.training, recipe.distillation)

    @property
    def fuse_key(self) -> str:
        """What lanes must share to step together: everything but alpha, T, learning rate, weight decay, seed."""
        fusible = {"learning_rate", "weight_decay", "seed"}
        return "\n".join(
            [
                self.network.model_dump_json(include=set(Network.model_fields)),
                self.training.model_dump_json(include=set(Training.model_fields) - fusible),
                self.distillation.model_dump_json(exclude={"alpha", "temperature"}),
            ]
        )


@dataclass(frozen=True)
class EpochReport:
    """One epoch of one lane. Losses are means over its steps; epochs count from 1."""

    epoch: int
    epochs: int
    loss: float
    distillation_loss: float
    student_loss: float
    val_accuracy: float
    val_correct: int
    val_loss: float
    learning_rate: float
    seconds: float
    weights: dict[str, Tensor] | None
    """On the CPU, and only where these are the weights to keep so far."""

    @property
    def finite(self) -> bool:
        """False where the training has diverged."""
        return math.isfinite(self.loss) and math.isfinite(self.val_loss)


def train(
    lanes: Sequence[Lane],
    splits: Splits,
    data: Data,
    teacher_logits: Float[Tensor, "views samples classes"] | None = None,
) -> Iterator[tuple[EpochReport, ...]]:
    """Train the lanes side by side; after each epoch yield their reports, in their order.

    `teacher_logits` are raw, one row for each training sample in each view of `data.augment`; None trains on
    the labels alone. Lanes must share their fuse key.
    """
    if len({lane.fuse_key for lane in lanes}) != 1:
        raise ValueError("lanes of one pack must share their fuse key")
    runners = [_Runner(lane, splits, views(data.augment), teacher_logits) for lane in lanes]
    for epoch in range(1, epochs_of(lanes[0].training, len(splits.train)) + 1):
        yield tuple(runner.epoch(epoch) for runner in runners)


def epochs_of(training: Training, samples: int) -> int:
    """How many epochs a training takes: `epochs`, or fewer under `max_steps`."""
    return math.ceil(_total_steps(training, samples) / _steps_per_epoch(training, samples))


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The learning rate of step 0 ... steps - 1.

    cosine: SGDR's annealing, arXiv:1608.03983 eq. 5, one period; one_cycle: arXiv:1708.07120 as in torch.
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


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, by SHA-256 (Python's own hash differs from process to process)."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class _Runner:
    """One lane in training: its network, its optimiser, its best epoch so far."""

    def __init__(
        self,
        lane: Lane,
        splits: Splits,
        views: Int64[Tensor, "views 3"],
        teacher_logits: Float[Tensor, "views samples classes"] | None,
    ) -> None:
        self.lane, self.splits, self.teacher_logits = lane, splits, teacher_logits
        self.device = splits.train.labels.device
        self.views = views.to(self.device)
        with torch.random.fork_rng(_cuda_devices(self.device)):
            torch.manual_seed(lane.training.seed)
            self.module = build(lane.network, splits.train)
        # Channels last: a quarter less time on a CPU, and what a GPU's convolutions want.
        self.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = _optimizer(self.module, lane.training)
        self.steps = _total_steps(lane.training, len(splits.train))
        self.best = -1

    def epoch(self, epoch: int) -> EpochReport:
        """Train epoch `epoch` (from 1), then evaluate on validation."""
        started = time.perf_counter()
        with torch.random.fork_rng(_cuda_devices(self.device)):
            torch.manual_seed(seed_of(self.lane.training.seed, "dropout", epoch))
            losses, rate = self._steps(epoch)
        evaluation = evaluate(self.module, self.splits.validation)
        epochs = epochs_of(self.lane.training, len(self.splits.train))
        keep = evaluation.correct > self.best if self.lane.training.keep == "best" else True
        self.best = max(self.best, evaluation.correct)
        total, distillation, student = losses.tolist()
        return EpochReport(
            epoch=epoch,
            epochs=epochs,
            loss=total,
            distillation_loss=distillation,
            student_loss=student,
            val_accuracy=evaluation.accuracy,
            val_correct=evaluation.correct,
            val_loss=evaluation.loss,
            learning_rate=rate,
            seconds=time.perf_counter() - started,
            weights=_copy(self.module) if keep else None,
        )

    def _steps(self, epoch: int) -> tuple[Float[Tensor, " 3"], float]:
        """The epoch's optimiser steps: their mean losses (total, distillation, student) and last learning rate."""
        training, samples = self.lane.training, len(self.splits.train)
        generator = torch.Generator().manual_seed(seed_of(training.seed, "order", epoch))
        order = torch.randperm(samples, generator=generator).to(self.device)
        drawn = torch.randint(len(self.views), (samples,), generator=generator).to(self.device)
        per_epoch, size = _steps_per_epoch(training, samples), min(training.batch_size, samples)
        first = (epoch - 1) * per_epoch
        sums, rate = torch.zeros(3, device=self.device), 0.0
        self.module.train()
        for step in range(first, min(first + per_epoch, self.steps)):
            batch = order[(step - first) * size :][:size]
            rate = learning_rate(training, step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._loss(batch, drawn[batch])
            self.optimizer.zero_grad()
            loss.total.backward()
            self.optimizer.step()
            sums += torch.stack(loss).detach()  # on the device: no .item() in the loop
        return sums / (min(first + per_epoch, self.steps) - first), rate

    def _loss(self, batch: Int64[Tensor, " batch"], chosen: Int64[Tensor, " batch"]) -> Loss:
        logits = self.module(pixels(self.splits.train, batch, self.views[chosen] if len(self.views) > 1 else None))
        labels = self.splits.train.labels[batch]
        if self.teacher_logits is None:
            student = nn.functional.cross_entropy(logits, labels)
            return Loss(student, torch.zeros_like(student), student)
        soft, how = self.teacher_logits[chosen, batch].to(logits.dtype), self.lane.distillation
        return distillation_loss(logits, soft, labels, how.alpha, how.temperature, how.scale_by_t_squared)


def _optimizer(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if training.optimizer == "sgd" else {}
    return kinds[training.optimizer](
        module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True, **extra
    )


def _steps_per_epoch(training: Training, samples: int) -> int:
    # Whole batches only: every step has the same shape, and no batch of one reaches BatchNorm.
    return max(samples // training.batch_size, 1)


def _total_steps(training: Training, samples: int) -> int:
    steps = training.epochs * _steps_per_epoch(training, samples)
    return min(steps, training.max_steps or steps)


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in module.state_dict().items()
    }


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
