"""What a search makes of its budget: how many different recipes it trains, and the size that is
selected.

    python -m benchmarks.searching [SWEEP.yaml] [--trials 30] [--seeds 1 2 3 4] [--samplers gp tpe]
    [--diverging]

Each study (sampler, seed) runs without and with `early_stop`, all in one run on one teacher. Two
recipes are the same here where their choices are equal and every number lies within 1 % of its
searched range (on the log scale where that is searched). With `--diverging` the learning rate is
searched by SGD up to rates at which about 15 % of the range diverges.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.early_stopping import name_of, run_study
from benchmarks.report import Row, print_report
from kdexp.config import Range, Recipe, Sweep, load
from kdexp.search.sweep import TrialFinished, TrialStarted
from kdexp.select.promote import candidates
from kdexp.selection import NothingPasses, select

SWEEP = Path(__file__).parents[1] / "sweeps" / "digits.yaml"
SAME = 0.01  # share of a number's searched range
DIVERGING = [
    "training.optimizer=sgd",
    "training.schedule=constant",
    "training.learning_rate=0.1",
    "search.training.learning_rate={low: 0.01, high: 1.0e5, log: true}",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    base, rows = load(options.sweep, DIVERGING if options.diverging else []), []
    with tempfile.TemporaryDirectory() as stores:
        for sampler in options.samplers:
            for seed in options.seeds:
                for early_stop in (False, True):
                    study = {
                        "sampler": sampler,
                        "seed": seed,
                        "trials": options.trials,
                        "early_stop": early_stop,
                    }
                    rows.append(_run(base, study, Path(stores)))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    title = (
        f"{options.trials} trials of '{base.name}': how many different recipes they train, and the"
        " size that is selected"
    )
    print_report(title, rows, {"rows": rows})


def different(recipes: Sequence[Recipe], sweep: Sweep) -> int:
    """How many recipes there are, each counted where none before it is the same."""
    kept: list[Recipe] = []
    for recipe in recipes:
        if not any(_same(recipe, other, sweep) for other in kept):
            kept.append(recipe)
    return len(kept)


def _same(one: Recipe, other: Recipe, sweep: Sweep) -> bool:
    for path, dimension in sweep.search.items():
        here, there = one.value(path), other.value(path)
        if not isinstance(dimension, Range):
            if here != there:
                return False
            continue
        numbers = (here, there, dimension.low, dimension.high)
        a, b, low, high = map(math.log, numbers) if dimension.log else numbers
        if abs(a - b) > SAME * (high - low):
            return False
    return True


def _run(base: Sweep, study: dict[str, Any], stores: Path) -> Row:
    events, tracking = run_study(base, study, stores)
    ended = [event.result.state for event in events if isinstance(event, TrialFinished)]
    try:
        selected = select(
            candidates(tracking.study(name_of(study)), tracking), base.selection
        ).parameters
    except NothingPasses:
        selected = None
    return {
        "sampler": study["sampler"],
        "seed": study["seed"],
        "early_stop": "on" if study["early_stop"] else "off",
        "different": different(
            [event.recipe for event in events if isinstance(event, TrialStarted)], base
        ),
        "stopped": ended.count("pruned"),
        "diverged": ended.count("diverged"),
        "selected": selected,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.searching", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("sweep", type=Path, nargs="?", default=SWEEP)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--samplers", nargs="+", default=["gp", "tpe"])
    parser.add_argument(
        "--diverging", action="store_true", help="search learning rates some of which diverge"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
