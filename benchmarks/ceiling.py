"""A training step of the documented student against what this machine's own kernels allow for its
shapes.

    python -m benchmarks.ceiling [--threads 1]

The ceiling is the time of the step's convolutions and matrix products alone: forward, gradient of
the weights, gradient of the input (not for the first layer, whose input needs none), each called by
itself on tensors of the student's shapes, channels last, and each at its fastest of many calls; in
fp32, and in bf16 where the machine has units for it. The step is kdexp's own (gather, normalise,
forward, loss, backward, Adam), also at its fastest, and at its median, plain and compiled. What is
not ceiling is the rest: BatchNorm, ReLU, pooling, dropout, loss, optimiser, gather, Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.report import Row, print_report
from kdexp.config import Recipe
from kdexp.distill.batches import views
from kdexp.distill.datasets import load_splits
from kdexp.distill.execution import multiplies_bf16
from kdexp.distill.packs import Drawn, Execution, Lane, Precision, Source, pack_of
from kdexp.environment import configure

CONVOLUTIONS = ((3, 16, 28), (16, 32, 14), (32, 64, 7))  # in, out, side
PRODUCTS = ((576, 128), (128, 10))
# stride, padding, dilation, transposed, output padding, groups
FLAGS = [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    configure("cpu", options.threads)
    batch, rows = Recipe().training.batch_size, list[Row]()
    figures: Row = {
        "matmul_1024_gflop_per_second": {
            name: _peak(dtype) for name, dtype in _precisions().items()
        }
    }
    for precision, dtype in _precisions().items():
        kernels, flop = _kernels(batch, dtype)
        rounds = [[_seconds(kernel) for kernel in kernels] for _ in range(options.rounds)]
        ceiling = sum(min(times) for times in zip(*rounds, strict=True))
        rows.append(
            _row(f"{precision}: convolutions and matrix products alone", [ceiling], ceiling, flop)
        )
        for title, compiled in (("plain", False), ("compiled", True)):
            times = _steps(compiled, precision, options.rounds * 10)
            rows.append(_row(f"{precision}: step, {title}", times, ceiling, flop))
        figures[precision] = {
            name: rows[-1][name] for name in ("ms", "ms_median", "share_of_ceiling", "share_median")
        }
    threads = torch.get_num_threads()
    title = f"Documented student, batch {batch}, {threads} thread(s)"
    print_report(title, rows, {**figures, "rows": rows})


def _precisions() -> dict[Precision, torch.dtype]:
    """Those that a long training may choose here."""
    both: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return both if multiplies_bf16(torch.device("cpu")) else {"fp32": torch.float32}


def _kernels(batch: int, dtype: torch.dtype) -> tuple[list[Callable[[], object]], float]:
    """Every convolution and product of a step by itself, and their FLOP together."""
    calls: list[Callable[[], object]] = []
    flop = 0.0
    for number, (inner, out, side) in enumerate(CONVOLUTIONS):
        x, y = (
            torch.randn(batch, c, side, side, dtype=dtype).to(memory_format=torch.channels_last)
            for c in (inner, out)
        )
        weight, bias = torch.randn(out, inner, 3, 3, dtype=dtype), torch.zeros(out, dtype=dtype)
        calls.append(lambda x=x, w=weight, b=bias: torch.ops.aten.convolution(x, w, b, *FLAGS))
        mask = [number > 0, True, False]
        calls.append(
            lambda x=x, y=y, w=weight, m=mask: torch.ops.aten.convolution_backward(
                y, x, w, None, *FLAGS, m
            )
        )
        flop += 2 * batch * side * side * inner * out * 9 * (3 if number else 2)
    for inner, out in PRODUCTS:
        x, y, weight = (
            torch.randn(shape, dtype=dtype)
            for shape in ((batch, inner), (batch, out), (inner, out))
        )
        calls += [
            lambda x=x, w=weight: x @ w,
            lambda x=x, y=y: x.T @ y,
            lambda y=y, w=weight: y @ w.T,
        ]
        flop += 6 * batch * inner * out
    return calls, flop


def _steps(compiled: bool, precision: Precision, count: int) -> list[float]:
    recipe = Recipe()
    train = load_splits(recipe.data).train
    source = Source(train, views(recipe.data.augment), torch.randn(2, len(train), 10).half())
    pack = pack_of([Lane.of(recipe)], source, Execution(compiled=compiled, precision=precision))
    generator, rate, times = torch.Generator().manual_seed(0), torch.tensor([3e-4]), []
    for step in range(count + 5):
        samples = torch.randint(len(train), (recipe.training.batch_size,), generator=generator)
        chosen = torch.randint(2, samples.shape, generator=generator)
        started = time.perf_counter()
        pack.step(Drawn(samples, chosen), rate, torch.tensor([step]))
        times.append(time.perf_counter() - started)
    return times[5:]  # the first compile and warm up


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _peak(dtype: torch.dtype) -> float:
    matrix: Tensor = torch.randn(1024, 1024, dtype=dtype)
    return round(2 * 1024**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(5)) / 1e9, 1)


def _row(title: str, times: list[float], ceiling: float, flop: float) -> Row:
    best, median = min(times), statistics.median(times)
    return {
        "what": title,
        "ms": round(best * 1e3, 2),
        "ms_median": round(median * 1e3, 2),
        "gflop_per_s": round(flop / best / 1e9, 1),
        "share_of_ceiling": round(ceiling / best, 3),
        "share_median": round(ceiling / median, 3),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceiling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
