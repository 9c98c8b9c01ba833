"""How long a network takes for one image, on one thread. A measurement of this machine at this
moment, never a fact of the network.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["Latency", "Runner", "latencies", "one_thread"]

Runner = Callable[[UInt8[Tensor, "images channels height width"]], object]
"""What makes logits of pixels as they are stored."""

BATCH = 100  # images at once, for how many a second
WARM_UP, FEWEST, MOST = 5, 40, 5000  # calls
SECONDS = 0.5  # of calls, for each network and batch
ROUNDS = 4  # in turn, so that a busy moment meets all


@dataclass(frozen=True)
class Latency:
    """Seconds for one image alone, and images a second in batches."""

    p50: float
    p90: float
    images_a_second: float
    calls: int
    """How many were timed one by one."""


@contextmanager
def one_thread() -> Iterator[None]:
    """In here torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latencies(
    runners: Mapping[str, Runner], images: UInt8[Tensor, "images channels height width"]
) -> dict[str, Latency]:
    """Time each of these on one of the images, and on 100 at once, on one thread of torch's: warmed
    up first, then in turn.

    What brings threads of its own (ONNX Runtime) must have been made with one. torch's number is
    set back.
    """
    with one_thread(), torch.no_grad():
        ones = {name: _Clock.warm(run, images[:1]) for name, run in runners.items()}
        many = {name: _Clock.warm(run, images[:BATCH]) for name, run in runners.items()}
        for _ in range(ROUNDS):
            for clock in (*ones.values(), *many.values()):
                clock.go_on()
    return {name: _latency(ones[name], many[name], len(images[:BATCH])) for name in runners}


@dataclass
class _Clock:
    """Times calls, some in each round."""

    timer: timeit.Timer
    calls: int
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def warm(cls, run: Runner, pixels: Tensor) -> _Clock:
        """Warmed up, with as many calls in a round as its time allows."""
        timer = timeit.Timer(lambda: run(pixels))
        timer.timeit(WARM_UP)
        mean = timer.timeit(WARM_UP) / WARM_UP
        return cls(timer, int(min(max(SECONDS / mean, FEWEST), MOST)) // ROUNDS)

    def go_on(self) -> None:
        """Another round, each call by itself."""
        self.seconds += self.timer.repeat(repeat=self.calls, number=1)


def _latency(one: _Clock, many: _Clock, batch: int) -> Latency:
    p50, p90 = np.quantile(one.seconds, [0.5, 0.9]).tolist()
    return Latency(p50, p90, batch / float(np.median(many.seconds)), len(one.seconds))
