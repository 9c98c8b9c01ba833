"""Model-epochs per second of K fused trials against one, for each way to lower their inner
convolutions.

    python -m benchmarks.fused [--lanes 1 8 32 64 128] [--precision fp32 bf16] [--device auto]
    [--compile]

One pack of K documented students (98,954 parameters) takes training steps on real Fashion-MNIST:
forward, backward, optimiser, on batches of 128 that all lanes share, as a sweep without a pruner
trains them; `own` are batches of each lane's own, as after a place was taken over. Every row is a
pack of this process, side by side in one run; a step is the shortest of several. First it is
checked that fused equals separate on this device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import get_args

import torch

from benchmarks.report import Row, print_report
from kdexp.config import Data, Recipe
from kdexp.distill.batches import views
from kdexp.distill.datasets import load_splits
from kdexp.distill.execution import step_seconds
from kdexp.distill.packs import Drawn, Execution, Lane, Precision, Source, Stacked
from kdexp.distill.stacked import Lowering
from kdexp.environment import configure


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    device = configure(options.device, options.threads)
    recipe = Recipe(
        data=Data(dataset=options.dataset, channels=3, augment={"flip": True, "shift": 0})
    )
    train = load_splits(recipe.data, device=device).train
    source = Source(
        train, views(recipe.data.augment).to(device), torch.zeros(2, len(train), 10, device=device)
    )
    lane, steps = Lane.of(recipe), len(train) // recipe.training.batch_size
    error = difference(lane, source)
    rows: list[Row] = []
    alone = 0.0
    for lanes in options.lanes:
        for how in _executions(lanes, options.compile, options.precision):
            rate = lanes / (step_seconds([lane] * lanes, source, how) * steps)
            alone = alone or rate  # the first row: K = 1 in the first precision
            rows.append(_row(how, rate, alone))
    best = max(rows, key=lambda row: row["model_epochs_per_second"])
    figures = {"device": str(device), "fused_minus_separate": error, "best": best, "rows": rows}
    print_report(
        f"Fused trials on {device}, {steps} steps an epoch (fused - separate: {error:.1e})",
        rows,
        figures,
    )


def difference(lane: Lane, source: Source, lanes: int = 3, steps: int = 10) -> float:
    """The largest relative difference of losses between lanes fused and each alone, in double
    precision.
    """
    size, device = lane.training.batch_size, source.split.labels.device
    others = [
        replace(lane, training=lane.training.model_copy(update={"seed": seed}))
        for seed in range(lanes)
    ]
    samples = [
        torch.arange(step * size, (step + 1) * size, device=device) % len(source.split)
        for step in range(steps)
    ]

    def losses(members: list[Lane]) -> torch.Tensor:
        pack = Stacked(members, source, Execution(len(members)), torch.float64)
        rates = torch.full((len(members),), 1e-3, dtype=torch.float64, device=device)
        at = torch.zeros(len(members), dtype=torch.int64, device=device)
        each = [
            pack.step(Drawn(batch, torch.zeros_like(batch)), rates, at + step).total
            for step, batch in enumerate(samples)
        ]
        return torch.stack(each)

    fused, apart = losses(others), torch.cat([losses([one]) for one in others], 1)
    return float(((fused - apart) / apart).abs().max())


def _executions(lanes: int, compiled: bool, precisions: Sequence[Precision]) -> list[Execution]:
    ways = [("grouped", True)] if lanes == 1 else list(product(get_args(Lowering), (True, False)))
    return [
        Execution(lanes, shared, compiled, lowering, each)
        for each in precisions
        for lowering, shared in ways
    ]


def _row(how: Execution, rate: float, alone: float) -> Row:
    return {
        "K": how.lanes,
        "lowering": how.lowering if how.lanes > 1 else "plain",
        "batches": "shared" if how.shared else "own",
        "precision": how.precision,
        "model_epochs_per_second": round(rate, 4),
        "over_one": round(rate / alone, 2),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fused", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--compile", action="store_true", help="compile each pack's step")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=["fp32"])
    parser.add_argument("--dataset", default="fashion_mnist", help="digits: without any download")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
