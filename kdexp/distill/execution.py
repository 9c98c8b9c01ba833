"""How a training is carried out here: compiled or not, in which precision, by which lowering, how
many lanes at once.

None of it belongs to a recipe (which may insist on a precision), all of it can be seen in a
result's last bits: the choice is made from the length of the training and from what measures
fastest on this device, recorded with the run, and kept by reproduction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import get_args

import torch
from torch import Tensor, nn

from kdexp.distill.datasets import Split
from kdexp.distill.models import measure, outline
from kdexp.distill.packs import Drawn, Execution, Lane, Precision, Source, pack_of, plan_for
from kdexp.distill.stacked import Lowering, convolve, inner_convolutions
from kdexp.distill.train import steps_of

__all__ = [
    "best_pack",
    "choose",
    "compiles",
    "depthwise",
    "fastest_lowering",
    "flop_of",
    "multiplies_bf16",
]

# Compiling takes 28 s the first time for a shape on a machine, 4 s from the cache in every process,
# and saves a quarter of each step (documented student, one thread: 52 ms -> 40 ms). From half a
# minute's training it pays over a sweep. A GPU does the same work some hundred times faster. Short
# trainings gain nothing by bf16 either.
LONG_FROM_FLOP = {"cpu": 1e12, "cuda": 1e14}
REPEATS, WARM_UP = 5, 2
PACK_SIZES = (1, 8, 16, 32, 64, 128)


def choose(lanes: Sequence[Lane], like: Split, refill: bool = False) -> Execution:
    """The execution for these lanes on the device of `like`; `refill`: places will be taken over by
    other lanes.
    """
    device, one = like.labels.device, lanes[0]
    stacked = plan_for(one, like) is not None
    bf16 = one.training.precision == "auto" and multiplies_bf16(device)
    long = (stacked or bf16) and flop_of(one, like) * len(lanes) >= LONG_FROM_FLOP.get(
        device.type, float("inf")
    )
    best: Precision = (
        "bf16" if long and bf16 and not (device.type == "cpu" and depthwise(one, like)) else "fp32"
    )
    return Execution(
        lanes=len(lanes),
        shared=not refill and len({lane.training.seed for lane in lanes}) == 1,
        compiled=stacked and long and compiles(str(device)),
        lowering=(
            fastest_lowering(one, len(lanes), like) if stacked and len(lanes) > 1 else "grouped"
        ),
        precision=best if one.training.precision == "auto" else one.training.precision,
    )


def flop_of(lane: Lane, like: Split) -> float:
    """What a training computes: forward, and twice that backward, at 2 FLOP for a multiply-add."""
    size = measure(outline(lane.network, like), like)
    return 6.0 * size.multiply_adds * lane.training.batch_size * steps_of(lane.training, len(like))


def depthwise(lane: Lane, like: Split) -> bool:
    """Whether some convolutions go channel by channel: on a CPU these are slower in bf16 than in
    fp32.
    """
    return any(
        isinstance(module, nn.Conv2d) and module.groups > 1
        for module in outline(lane.network, like).modules()
    )


def best_pack(lane: Lane, source: Source, most: int) -> int:
    """How many copies of a lane train fastest as one, counted in steps of a lane per second; 1 on a
    CPU.

    On two CPU cores packs of 8 and more were slower than one (see docs/performance.md).
    """
    sizes = [size for size in PACK_SIZES if size <= most]
    if (
        source.split.labels.device.type == "cpu"
        or len(sizes) < 2
        or plan_for(lane, source.split) is None
    ):
        return 1
    return max(sizes, key=lambda size: size / step_seconds([lane] * size, source))


def step_seconds(lanes: Sequence[Lane], source: Source, how: Execution | None = None) -> float:
    """The shortest of a few steps of a pack."""
    how = how or choose(lanes, source.split)
    pack, device = pack_of(lanes, source, how), source.split.labels.device
    samples = torch.arange(lanes[0].training.batch_size, device=device) % len(source.split)
    samples = samples if how.shared else samples.expand(len(lanes), -1)
    rates = torch.full((len(lanes),), 1e-4, device=device)
    best = float("inf")
    for repeat in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        steps = torch.full((len(lanes),), repeat, device=device)
        # waits for a GPU
        pack.step(Drawn(samples, torch.zeros_like(samples)), rates, steps).total.sum().item()
        best = min(best, time.perf_counter() - started) if repeat >= WARM_UP else best
    return best


@cache
def compiles(device: str) -> bool:
    """Whether torch.compile works here: there is a compiler, and its cache can be written."""
    try:
        return bool(torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))[0] == 1)
    except Exception:  # a compiler has many ways to fail; each means that we do without it
        return False


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16: otherwise bf16 is slower than fp32. On a CPU by AMX or
    AVX512-BF16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def fastest_lowering(lane: Lane, lanes: int, like: Split) -> Lowering:
    """The quickest form of the student's inner convolutions for so many lanes, forward and
    backward, measured now.
    """
    plan = plan_for(lane, like) or ()
    shapes = tuple(
        (layer.shape[1], layer.shape[0], layer.side[0], layer.side[1])
        for layer in inner_convolutions(plan)
    )
    return (
        _fastest(shapes, lanes, lane.training.batch_size, str(like.labels.device))
        if shapes
        else "grouped"
    )


@cache
def _fastest(
    shapes: tuple[tuple[int, int, int, int], ...], lanes: int, batch: int, device: str
) -> Lowering:
    return min(
        get_args(Lowering),
        key=lambda lowering: sum(_seconds(lowering, *s, lanes, batch, device) for s in shapes),
    )


def _seconds(
    lowering: Lowering,
    inner: int,
    out: int,
    height: int,
    width: int,
    lanes: int,
    batch: int,
    device: str,
) -> float:
    x = (
        torch.zeros(batch, lanes * inner, height, width, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    weight = torch.zeros(lanes, out, inner, 3, 3, device=device, requires_grad=True)
    bias = torch.zeros(lanes, out, device=device)

    def once() -> Tensor:
        return torch.autograd.grad(convolve(x, weight, bias, lowering).sum(), [x, weight])[1]

    best = float("inf")
    for repeat in range(REPEATS):
        started = time.perf_counter()
        once()[0, 0, 0, 0, 0].item()  # waits for a GPU
        # the first one warms up
        best = min(best, time.perf_counter() - started) if repeat else best
    return best
