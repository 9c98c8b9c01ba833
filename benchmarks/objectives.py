"""Whether aiming at the smallest finds a smaller model that meets the bar than maximising accuracy
and filtering.

    python -m benchmarks.objectives [--trials 24] [--seeds 1 2 3 ...] [--samplers gp tpe]

Each study (sampler, seed) runs once with `objective: accuracy` and once with `objective: smallest`,
side by side in one run, on one teacher, with the same bar, seed, search space and number of trained
trials, controls included. The selector then picks the smallest over the bar. The sweep is
sweeps/digits.yaml with half of its epochs and 224 students: 14 widths x 16 hidden layers. Test
accuracy is of the selected models alone, and chose nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.early_stopping import name_of, run_study
from benchmarks.report import Row, print_report
from kdexp.config import Sweep, load
from kdexp.distill.datasets import load_test
from kdexp.distill.evaluate import evaluate
from kdexp.runs.records import load_student, recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.search.sweep import EpochDone, TrialSkipped
from kdexp.select.promote import candidates
from kdexp.selection import Candidate, NothingPasses, select

DIGITS = Path(__file__).parents[1] / "sweeps" / "digits.yaml"
WIDTHS = (
    "[2, 4, 8], [3, 6, 12], [4, 8, 12], [4, 8, 16], [6, 8, 16], [4, 8, 24], [6, 12, 24], "
    "[8, 12, 24], [6, 12, 32], [8, 16, 32], [8, 16, 48], [12, 24, 48], [12, 24, 64], [16, 32, 64]"
)
CHANGES = [
    "training.epochs=10",
    f"search.student.channels={{choices: [{WIDTHS}]}}",
    "search.student.hidden={low: 8, high: 128, step: 8}",
    "search.training.learning_rate={low: 1.0e-3, high: 3.0e-2, log: true}",
    "selection={accuracy_bar: 0.97}",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    base, rows = load(DIGITS, CHANGES), []
    with tempfile.TemporaryDirectory() as stores:
        for sampler in options.samplers:
            for seed in options.seeds:
                study = {"sampler": sampler, "seed": seed, "trials": options.trials}
                found = {
                    aim: _run(base, {**study, "objective": aim}, Path(stores))
                    for aim in ("accuracy", "smallest")
                }
                rows.append(_row(sampler, seed, found))
                print(json.dumps(rows[-1]), file=sys.stderr)
    counts = {
        sampler: _counts([row for row in rows if row["sampler"] == sampler])
        for sampler in options.samplers
    }
    title = (
        f"Parameters that 'accuracy' and 'smallest' come to: {options.trials} trained trials of"
        f" {base.training.epochs} epochs, bar {base.selection.accuracy_bar}; test: accuracy of"
        " the two"
    )
    print_report(
        title,
        rows,
        {"smaller_in": counts[options.samplers[0]]["smaller"], "counts": counts, "rows": rows},
    )


def _run(base: Sweep, study: Mapping[str, Any], stores: Path) -> dict[str, Any]:
    """One study: its model-epochs, how many proposals it did not train, and the selected model."""
    events, tracking = run_study(base, study, stores)
    try:
        chosen = select(candidates(tracking.study(name_of(study)), tracking), base.selection)
    except NothingPasses:
        chosen = None
    return {
        "epochs": sum(isinstance(event, EpochDone) for event in events),
        "not_trained": sum(isinstance(event, TrialSkipped) for event in events),
        "parameters": chosen.parameters if chosen else None,
        "test": _test_accuracy(chosen, tracking) if chosen else None,
    }


def _test_accuracy(chosen: Candidate, tracking: Tracking) -> float:
    run = tracking.read(chosen.run_id)
    recipe = recipe_of(run, tracking)
    test = load_test(recipe.data)
    with torch.random.fork_rng([]):
        return evaluate(load_student(run, recipe, test, tracking), test).accuracy


def _row(sampler: str, seed: int, found: Mapping[str, Mapping[str, Any]]) -> Row:
    one, other = found["accuracy"], found["smallest"]
    sizes = [each["parameters"] or float("inf") for each in (one, other)]
    return {
        "sampler": sampler,
        "seed": seed,
        "accuracy": one["parameters"],
        "smallest": other["parameters"],
        "share": round(sizes[1] / sizes[0], 3) if max(sizes) < float("inf") else None,
        "it_is": "smaller" if sizes[1] < sizes[0] else "larger" if sizes[1] > sizes[0] else "equal",
        "test": f"{one['test'] or 0:.4f} / {other['test'] or 0:.4f}",
        "epochs": f"{one['epochs']} / {other['epochs']}",
        "not_trained": other["not_trained"],
    }


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    found = [row["it_is"] for row in rows]
    return {
        "smaller": found.count("smaller"),
        "ties": found.count("equal"),
        "larger": found.count("larger"),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.objectives", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--samplers", nargs="+", default=["gp"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
