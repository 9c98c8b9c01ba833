"""What the parts of a training take on this machine now: real steps, timed, of which nothing is
kept.

Student steps are timed in as many processes at once as a sweep would have, because they share the
machine's memory and cores.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from kdexp import KdexpError
from kdexp.config import Data
from kdexp.distill.batches import pixels, views
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.evaluate import BATCH, logits_of
from kdexp.distill.packs import Drawn, Execution, Lane, Source, pack_of
from kdexp.distill.train import TeacherLogits, train
from kdexp.environment import configure
from kdexp.workers.processes import start_method

__all__ = ["Pace", "Rehearsal", "few", "pace", "pass_seconds", "side_by_side"]

WARM_UP, LEAST, MOST = 2, 5, 100  # steps
SECONDS = 3.0  # for so long steps are timed, where they are short
START_SECONDS = 300.0


@dataclass(frozen=True)
class Pace:
    """What a pack of students, or a teacher's network, takes."""

    begin: float
    """Seconds until its first step is done: networks made and checked, compiled if it is."""
    step: float
    """Seconds of a step, median."""
    batch: float
    """Seconds to evaluate BATCH images."""
    memory: int
    """Bytes, at their peak, of the process that it ran in."""
    cold: float = 0.0
    """Seconds more that its very first beginning took: what a process does once."""


@dataclass(frozen=True)
class Rehearsal:
    """What is timed: lanes that train as one, on a few images like all."""

    lanes: tuple[Lane, ...]
    how: Execution
    data: Data
    splits: Splits
    """A few images of each: see `few`."""
    distils: bool


def few(splits: Splits, batch: int) -> Splits:
    """Images enough for two steps and an evaluation."""
    train = splits.train.take(torch.arange(min(len(splits.train), 2 * batch)))
    held = splits.validation.take(torch.arange(min(len(splits.validation), BATCH)))
    return Splits(train, held)


def pace(rehearsal: Rehearsal) -> Pace:
    """Begin a training as the trainer does, then time steps and an evaluation."""
    lanes, splits, how = rehearsal.lanes, rehearsal.splits, rehearsal.how
    soft = _soft(rehearsal) if rehearsal.distils else None
    once = tuple(
        replace(lane, training=lane.training.model_copy(update={"max_steps": 1})) for lane in lanes
    )
    begun = []
    # what a process does once, such as importing, is not each training's; compiling is
    for _ in range(1 if how.compiled else 2):
        started = time.perf_counter()
        training = train(once, splits, rehearsal.data, soft, how)
        next(training)
        training.close()
        begun.append(time.perf_counter() - started)
    at = views(rehearsal.data.augment).to(splits.train.labels.device)
    pack = pack_of(lanes, Source(splits.train, at, _by_view(soft, len(at))), how)
    cold = max(begun[0] - begun[-1], 0.0)
    step, batch = _step_seconds(pack, rehearsal), _batch_seconds(pack, splits)
    return Pace(begun[-1], step, batch, _peak(), cold)


def pass_seconds(module: torch.nn.Module, split: Split) -> float:
    """Seconds for an image through a network, in batches as a teacher's cache is filled."""
    some = split.take(torch.arange(min(len(split), BATCH), device=split.labels.device))
    return _median(lambda: logits_of(module, some)[0, 0].item()) / len(some)


def side_by_side(
    rehearsals: Sequence[Rehearsal], workers: int, threads: int, device: str
) -> tuple[list[Pace], float]:
    """The pace of each rehearsal, and the seconds that workers took to start: in this process where
    there is one worker, else in so many at once, of which the slowest counts.
    """
    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return [pace(rehearsal) for rehearsal in rehearsals], 0.0
        finally:
            torch.set_num_threads(before)
    context: Any = multiprocessing.get_context(start_method())
    started = time.perf_counter()
    barrier = context.Barrier(workers)
    ready = (device, threads, barrier)
    with ProcessPoolExecutor(workers, context, _ready, ready) as pool:
        try:
            list(pool.map(_wait, range(workers)))
            start = time.perf_counter() - started
            orders = [pickle.dumps(one) for one in rehearsals]
            found = [list(pool.map(_pace_at_once, [one] * workers)) for one in orders]
        except BrokenProcessPool:
            raise KdexpError(
                "A worker ended while steps were timed (the system does that where memory is"
                " short): give fewer --workers, or a smaller batch_size"
            ) from None
    return [_slowest(paces) for paces in found], start


def _slowest(paces: Sequence[Pace]) -> Pace:
    return Pace(
        max(one.begin for one in paces),
        max(one.step for one in paces),
        max(one.batch for one in paces),
        max(one.memory for one in paces),
        max(one.cold for one in paces),
    )


_barrier: Any = None


def _ready(device: str, threads: int, barrier: Any) -> None:
    global _barrier
    configure(device, threads)
    torch.set_num_threads(threads)
    _barrier = barrier


def _wait(_: int) -> None:
    """Until every process is here: each then takes one rehearsal."""
    _barrier.wait(START_SECONDS)


def _pace_at_once(orders: bytes) -> Pace:
    rehearsal: Rehearsal = pickle.loads(orders)  # noqa: S301 - our parent's own
    _wait(0)
    return pace(rehearsal)


def _soft(rehearsal: Rehearsal) -> TeacherLogits:
    split = rehearsal.splits.train
    erases = rehearsal.lanes[0].training.random_erasing > 0
    rows = 1 if erases else len(views(rehearsal.data.augment))
    shape = rows, len(split), len(split.classes)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(torch.float16)
    return TeacherLogits(logits.to(split.labels.device), "epoch" if erases else "view")


def _by_view(soft: TeacherLogits | None, count: int) -> torch.Tensor | None:
    return None if soft is None else soft.logits[:1].expand(count, -1, -1)


def _step_seconds(pack: Any, rehearsal: Rehearsal) -> float:
    split, count = rehearsal.splits.train, len(rehearsal.lanes)
    device, batch = split.labels.device, rehearsal.lanes[0].training.batch_size
    samples = torch.arange(min(batch, len(split)), device=device)
    samples = samples if rehearsal.how.shared else samples.expand(count, -1)
    rates, steps = torch.full((count,), 1e-4, device=device), torch.zeros(count, device=device)
    drawn = Drawn(samples, torch.zeros_like(samples))
    # waits for a GPU
    return _median(lambda: pack.step(drawn, rates, steps.long()).total.sum().item())


def _batch_seconds(pack: Any, splits: Splits) -> float:
    split = splits.validation
    every = torch.arange(len(split), device=split.labels.device)
    return _median(lambda: pack.logits(pixels(split, every)).sum().item()) * BATCH / len(split)


def _median(work: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        work()
    took: list[float] = []
    while len(took) < LEAST or (sum(took) < SECONDS and len(took) < MOST):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return median(took)


def _peak() -> int:
    """0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
