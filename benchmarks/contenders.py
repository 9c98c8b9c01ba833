"""What people train a student with instead, each as a process of its own that prints one line of
JSON.

    python -m benchmarks.contenders CONTENDER --teacher WEIGHTS --epochs E

CONTENDER: common, torchdistill, careful or careful_bf16.

All distil the documented student from the same ResNet-50 on the same split of real Fashion-MNIST:
batch 128, flips, alpha 0.3 (the teacher's weight), T 5, T^2 factor, Adam with weight decay 1e-6,
cosine from 3e-4 to 1e-6 a step.

    common        the recipe's loop as it is commonly written: PIL images through a DataLoader, the
                  teacher online in every step, `.item()` for the log
    torchdistill  its DistillationBox and KDLoss as its examples use them, on the same DataLoader
    careful       an expert's script: images as one tensor, the teacher's logits cached once,
                  channels last, fused Adam, a compiled step; one trial after another on all cores
    careful_bf16  the same under bf16 autocast
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from kdexp.config import Recipe
from kdexp.distill.datasets import Split, Splits, load_splits
from kdexp.distill.evaluate import wilson_interval
from kdexp.distill.models import build

ALPHA, TEMPERATURE, RATE, FINAL_RATE, DECAY, BATCH, SEED = 0.3, 5.0, 3e-4, 1e-6, 1e-6, 128, 8787
NORMALISE = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
TRAIN = transforms.Compose(
    [transforms.Grayscale(3), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE]
)
TEST = transforms.Compose([transforms.Grayscale(3), transforms.ToTensor(), NORMALISE])

Epoch = tuple[list[float], float, float]
"""Seconds of each step, seconds of the validation, validation accuracy."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by one of the contenders; print what it took."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    splits = load_splits(Recipe().data)
    if options.images:
        splits = Splits(
            splits.train.take(torch.arange(options.images)),
            splits.validation.take(torch.arange(options.images)),
        )
    teacher = torchvision.models.resnet50(num_classes=10)
    teacher.load_state_dict(load_file(options.teacher))
    student = build(Recipe().student, splits.train)
    began = time.perf_counter()
    contender = CONTENDERS[options.name]
    epochs = list(contender(teacher.eval(), student, splits, options.epochs, options.steps))
    print(
        json.dumps(
            _figures(options.name, epochs, time.perf_counter() - began, len(splits.validation))
        )
    )


def common(
    teacher: nn.Module, student: nn.Module, splits: Splits, epochs: int, steps: int | None
) -> Iterator[Epoch]:
    """The recipe's loop, plainly."""
    train, validation = _loader(splits.train, TRAIN, True), _loader(splits.validation, TEST, False)
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, weight_decay=DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * len(train), FINAL_RATE
    )
    log = []
    for _ in range(epochs):
        times = []
        student.train()
        for images, labels in _first(train, steps, times):
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = _loss(student(images), teacher_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            log.append(loss.item())
        yield times, *_validate(student, validation)


def torchdistill(
    teacher: nn.Module, student: nn.Module, splits: Splits, epochs: int, steps: int | None
) -> Iterator[Epoch]:
    """torchdistill's distillation box; its alpha weighs the labels."""
    from torchdistill.core.distillation import get_distillation_box

    train = _Images(splits.train, TRAIN)
    per_epoch = len(train) // BATCH
    logits = {"student": f"{len(student) - 1}", "teacher": "fc"}
    kd = {
        "student_module_path": logits["student"],
        "student_module_io": "output",
        "teacher_module_path": logits["teacher"],
        "teacher_module_io": "output",
        "temperature": TEMPERATURE,
        "alpha": 1 - ALPHA,
    }
    config: dict[str, Any] = {
        "num_epochs": epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": BATCH, "drop_last": True, "num_workers": 0},
        },
        "teacher": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"input": [], "output": [logits["teacher"]]},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"input": [], "output": [logits["student"]]},
        },
        "optimizer": {"key": "Adam", "kwargs": {"lr": RATE, "weight_decay": DECAY}},
        "scheduler": {
            "key": "CosineAnnealingLR",
            "kwargs": {"T_max": epochs * per_epoch, "eta_min": FINAL_RATE},
            "scheduling_step": 1,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
            },
        },
    }
    box = get_distillation_box(
        teacher, student, {"train": train}, config, torch.device("cpu"), None, False, 1
    )
    validation, log = _loader(splits.validation, TEST, False), []
    for epoch in range(epochs):
        times: list[float] = []
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in _first(box.train_data_loader, steps, times):
            box.pre_forward_process()
            loss = box.forward_process(images, labels, extra)
            box.post_forward_process(loss=loss)
            log.append(loss.item())
        yield times, *_validate(student, validation)
        box.post_epoch_process()


def careful(
    teacher: nn.Module,
    student: nn.Module,
    splits: Splits,
    epochs: int,
    steps: int | None,
    bf16: bool = False,
) -> Iterator[Epoch]:
    """Everything on the device, cached logits of both flips, compiled."""
    began = time.perf_counter()
    teacher = teacher.to(memory_format=torch.channels_last)
    images, labels = splits.train.images, splits.train.labels
    cached = torch.stack([_logits(teacher, view) for view in (images, images.flip(3))])
    careful.fill_seconds = time.perf_counter() - began  # type: ignore[attr-defined]
    student = student.to(memory_format=torch.channels_last)
    compiled = torch.compile(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    per_epoch = len(labels) // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * per_epoch, FINAL_RATE
    )
    for _ in range(epochs):
        student.train()
        order, flips = torch.randperm(len(labels)), torch.randint(2, (len(labels),))
        times: list[float] = []
        for samples in _first(order[: per_epoch * BATCH].split(BATCH), steps, times):
            flip, batch = flips[samples], images[samples]
            batch = _floats(torch.where(flip.bool()[:, None, None, None], batch.flip(3), batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = compiled(batch)
            loss = _loss(logits.float(), cached[flip, samples], labels[samples])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        started = time.perf_counter()
        student.eval()
        correct = int(
            (_logits(student, splits.validation.images).argmax(1) == splits.validation.labels).sum()
        )
        yield times, time.perf_counter() - started, correct / len(splits.validation)


CONTENDERS: dict[str, Callable[..., Iterator[Epoch]]] = {
    "common": common,
    "torchdistill": torchdistill,
    "careful": careful,
    "careful_bf16": partial(careful, bf16=True),
}


class _Images(Dataset):  # type: ignore[type-arg]
    """Samples as PIL images through transforms, one by one."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.images = [Image.fromarray(image) for image in np.asarray(split.images[:, 0])]
        self.labels, self.transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.transform(self.images[sample]), self.labels[sample]


def _loader(split: Split, transform: Callable[[Any], Tensor], train: bool) -> DataLoader:  # type: ignore[type-arg]
    # Without loader processes: on two cores they took 0.56 s a step, this 0.50 s.
    return DataLoader(
        _Images(split, transform), BATCH if train else 500, shuffle=train, drop_last=train
    )


def _loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, 1),
        F.softmax(teacher_logits / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(student_logits, labels)


def _first(batches: Any, steps: int | None, times: list[float]) -> Iterator[Any]:
    """The batches, or the first few; notes how long each took with what was done on it."""
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == steps:
            return
        yield batch
        now = time.perf_counter()
        times.append(now - started)
        started = now


@torch.no_grad()
def _validate(student: nn.Module, validation: DataLoader) -> tuple[float, float]:  # type: ignore[type-arg]
    started = time.perf_counter()
    student.eval()
    correct = sum(int((student(images).argmax(1) == labels).sum()) for images, labels in validation)
    return time.perf_counter() - started, correct / len(validation.dataset)  # type: ignore[arg-type]


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(_floats(batch)) for batch in images.split(250)])


def _floats(images: Tensor) -> Tensor:
    floats = (images.float() / 255 - 0.5) / 0.5
    return floats.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def _figures(name: str, epochs: list[Epoch], seconds: float, samples: int) -> dict[str, Any]:
    steps = [step for times, _, _ in epochs for step in times]
    accuracy = epochs[-1][2]
    trained = sum(steps) + sum(validation for _, validation, _ in epochs)
    return {
        "name": name,
        "step_seconds": statistics.median(steps),
        "seconds_per_epoch": trained / len(epochs),
        "fill_seconds": getattr(careful, "fill_seconds", 0.0),
        "first_step_seconds": steps[0],
        "seconds": seconds,
        "val_accuracy": accuracy,
        "val_interval": wilson_interval(round(accuracy * samples), samples),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contenders")
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument(
        "--teacher", type=Path, required=True, help="ResNet-50 with 10 outputs, .safetensors"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps of an epoch, for a quick look")
    parser.add_argument("--images", type=int, help="only the first images")
    parser.add_argument("--threads", type=int)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
