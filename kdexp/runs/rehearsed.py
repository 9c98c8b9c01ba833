"""What recording takes here: a training recorded for real, in stores that are thrown away."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kdexp.config import Recipe
from kdexp.distill.datasets import Splits
from kdexp.distill.models import build
from kdexp.distill.randomness import drawing
from kdexp.distill.teacher import CachedTeacher
from kdexp.distill.train import EPOCH_METRICS, TeacherLogits
from kdexp.runs.bench import Bench
from kdexp.runs.recording import Entry, Form, begin
from kdexp.runs.tracking import Tracking
from kdexp.settings import Settings
from kdexp.workers.work import Ended, Prepared, Row

__all__ = ["Recorded", "rehearse_recording"]


@dataclass(frozen=True)
class Recorded:
    """Seconds, measured."""

    store: float
    """To make MLflow's store."""
    training: float
    """To record one training, from its run's begin to its end."""


def rehearse_recording(recipe: Recipe, splits: Splits, epochs: int) -> Recorded:
    """Record a training of so many epochs twice; the second time counts."""
    with tempfile.TemporaryDirectory() as temporary:
        settings, cpu = Settings(stores=Path(temporary) / "mlruns"), torch.device("cpu")
        started = time.perf_counter()
        tracking = Tracking(settings)
        bench = Bench(settings, tracking, cpu, tracking.experiment("check"))
        store = time.perf_counter() - started
        prepared = Prepared(recipe.data, splits, _teacher(splits), "")
        for _ in range(2):
            started = time.perf_counter()
            _record(recipe, prepared, bench, epochs)
            training = time.perf_counter() - started
    return Recorded(store, training)


def _record(recipe: Recipe, prepared: Prepared, bench: Bench, epochs: int) -> None:
    entry = Entry("trial", "check", None, {"kdexp.trial": "0"})
    like = prepared.splits.train
    recording = begin(recipe, prepared, bench, entry, Form.alone(recipe, like))
    for number in range(1, epochs + 1):
        row: Row = {"epoch": number, "time_ms": 0, **dict.fromkeys(EPOCH_METRICS, 0.5)}
        recording.history.append(row)
    with drawing():
        weights = build(recipe.student, like).state_dict()
    recording.conclude(Ended(0, 0, recording.run_id, "complete", None, epochs, 1, weights))


def _teacher(splits: Splits) -> CachedTeacher:
    """A teacher that is only spoken of."""
    none = TeacherLogits(torch.zeros(1, len(splits.train), len(splits.train.classes)))
    known = "0" * 64, "0" * 64, none, 1, 1, 1
    return CachedTeacher(*known, Path("weights"), (), Path("cache"))
