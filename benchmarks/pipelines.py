"""A sweep by kdexp against what people would do instead, in model-epochs per hour at equal
accuracy.

    python -m benchmarks.pipelines [--epochs 3] [--trials 8] [--workers 2]

Side by side in one run, on real Fashion-MNIST, for the documented student and one ResNet-50 teacher
(trained for one epoch first, and kept in --stores): the contenders of `benchmarks.contenders`, each
a training in a process of its own, then a whole `kdexp sweep`: its time is that of the command from
start to end, Optuna, MLflow, process start, compilation and selection included. Every row has done
the same steps; trial 0 of the sweep has the values that the contenders train with, so its accuracy
is the one to compare. Filling the teacher's cache is left out of the careful script's and kdexp's
figures, given beside them, and added in the rows "with cache".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.report import Row, print_report
from kdexp.config import load
from kdexp.distill.execution import multiplies_bf16
from kdexp.runs.tracking import Tracking
from kdexp.select.promote import candidates
from kdexp.settings import Settings

DOCUMENTED = 50 * 500  # model-epochs of the documented sweep
TITLES = {
    "common": "the recipe's loop as commonly written",
    "torchdistill": "torchdistill",
    "careful": "careful script, one trial after another",
    # where the machine has units for it, as kdexp uses them
    "careful_bf16": "careful script in bf16 by autocast",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all; print the table, and last the line of JSON."""
    options = _options(arguments)
    # a study of its own: nothing is taken over from a former run
    name = f"pipelines-{time.time():.0f}"
    sweep = options.stores / f"{name}.yaml"
    options.stores.mkdir(parents=True, exist_ok=True)
    sweep.write_text(yaml.safe_dump(_sweep(name, options.epochs, options.trials, None)))
    weights = _teacher(sweep, options)
    sweep.write_text(yaml.safe_dump(_sweep(name, options.epochs, options.trials, str(weights))))
    narrow = multiplies_bf16(torch.device("cpu"))
    found = {
        each: _contender(each, weights, options)
        for each in TITLES
        if narrow or each != "careful_bf16"
    }
    # its cache is warm
    subprocess.run(_kdexp("teacher", sweep, options), check=True, stdout=subprocess.DEVNULL)
    ours = _our_sweep(name, sweep, options)
    print_report(*_report(found, ours, options))


def _report(
    found: dict[str, dict[str, Any]], ours: dict[str, Any], options: argparse.Namespace
) -> tuple[str, list[Row], Row]:
    seconds = {name: _seconds(each) for name, each in found.items()}
    seconds["kdexp"] = ours["seconds"] / (options.trials * options.epochs)
    fill = found["careful"]["fill_seconds"]
    rows = [_row(TITLES[name], seconds[name], seconds, found[name]) for name in found]
    rows.append(
        _row(
            f"kdexp sweep, {options.workers} workers, {options.trials} trials",
            seconds["kdexp"],
            seconds,
            ours,
        )
    )
    for title, epochs in (
        ("this sweep", options.trials * options.epochs),
        ("50 x 500 epochs", DOCUMENTED),
    ):
        rows.append(
            _row(f"kdexp with cache, {title}", seconds["kdexp"] + fill / epochs, seconds, ours)
        )
    figures = {
        **{f"over_{name}": round(seconds[name] / seconds["kdexp"], 2) for name in found},
        "accuracies": {
            **{name: each["val_accuracy"] for name, each in found.items()},
            "kdexp": ours["val_accuracy"],
        },
        "seconds_per_model_epoch": seconds,
        "cache_fill_seconds": fill,
        "epochs": options.epochs,
        "trials": options.trials,
        "workers": options.workers,
    }
    title = (
        f"Model-epochs per hour, documented student under ResNet-50, {options.epochs} epochs"
        f" (cache: {fill:.0f} s once)"
    )
    return title, rows, figures


def _seconds(contender: dict[str, Any]) -> float:
    """Seconds of a model-epoch with its validation, without the first step's compilation."""
    extra = (
        contender["first_step_seconds"] - contender["step_seconds"]
        if contender["name"].startswith("careful")
        else 0.0
    )
    return contender["seconds_per_epoch"] - extra / contender["epochs"]


def _row(
    title: str, seconds: float, all_seconds: dict[str, float], accuracy: dict[str, Any]
) -> Row:
    low, high = accuracy["val_interval"]
    return {
        "pipeline": title,
        "s_per_model_epoch": seconds,
        "model_epochs_per_hour": 3600 / seconds,
        "over_common": all_seconds["common"] / seconds,
        "val_accuracy": f"{accuracy['val_accuracy']:.2%} [{low:.2%}, {high:.2%}]",
    }


def _teacher(sweep: Path, options: argparse.Namespace) -> Path:
    print("teacher …", file=sys.stderr)
    done = subprocess.run(
        _kdexp("teacher", sweep, options), check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(done.stdout.split("weights ")[1].splitlines()[0]).resolve()


def _contender(name: str, weights: Path, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{name} …", file=sys.stderr)
    steps = ["--steps", str(options.steps)] if options.steps else []
    command = [sys.executable, "-m", "benchmarks.contenders", name, "--teacher", str(weights)]
    done = subprocess.run(
        [*command, "--epochs", str(options.epochs), *steps],
        check=True,
        capture_output=True,
        text=True,
    )
    figures = {**json.loads(done.stdout.splitlines()[-1]), "epochs": options.epochs}
    print(json.dumps(figures), file=sys.stderr)
    return figures


def _our_sweep(name: str, sweep: Path, options: argparse.Namespace) -> dict[str, Any]:
    print("kdexp …", file=sys.stderr)
    started = time.perf_counter()
    subprocess.run(
        [*_kdexp("sweep", sweep, options), "--workers", str(options.workers)],
        check=True,
        stdout=sys.stderr,
    )
    seconds = time.perf_counter() - started
    tracking = Tracking(Settings(stores=options.stores))
    first = candidates(tracking.study(load(sweep).name), tracking)[0]
    metrics = tracking.read(first.run_id).metrics
    interval = metrics["val_accuracy_low"], metrics["val_accuracy_high"]
    return {"seconds": seconds, "val_accuracy": first.val_accuracy, "val_interval": interval}


def _kdexp(command: str, sweep: Path, options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "kdexp", command, str(sweep), "--stores", str(options.stores)]


def _sweep(name: str, epochs: int, trials: int, weights: str | None) -> dict[str, Any]:
    """The documented recipe with fewer epochs, searched over what does not change the work."""
    return {
        "name": name,
        "data": {"dataset": "fashion_mnist"},
        "teacher": {"architecture": "resnet50", "weights": weights, "epochs": 1},
        "training": {"epochs": epochs, "keep": "last"},
        "search": {
            "distillation.alpha": {"low": 0.0, "high": 1.0},
            "distillation.temperature": {"low": 1.0, "high": 20.0, "log": True},
            "training.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True},
        },
        "study": {"objective": "accuracy", "trials": trials, "sampler": "random"},
        "selection": {"accuracy_bar": 0.5},
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipelines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of a contender's epoch, for a quick look at its speed alone",
    )
    parser.add_argument("--stores", type=Path, default=Path("mlruns/benchmarks"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
