"""The tables and the picture of docs/results.md, from the stores that its studies were run in.

    python -m benchmarks.results --stores STORES

A study that `kdexp confirm` has confirmed is a row of docs/results/frontier.csv and a point of
frontier.png: means over its fresh seeds. A grid over seeds is a row for each way to distil in
docs/results/distillation.csv: validation accuracy minus that of the same seed with labels only,
mean and standard deviation over the seeds. What each run recorded of itself goes to
docs/results/runs/, so that the tables can be checked without the stores.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Row, print_report
from kdexp.config import ConfigError, Distillation, Sweep, flatten, load
from kdexp.runs.plots import BLUE, GREY
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import Kind, RunRecord, Tracking
from kdexp.select.promote import sweep_of
from kdexp.settings import Settings

RESULTS = Path("docs/results")
RECORDED = (
    "kdexp.weights_sha256",
    "kdexp.teacher_sha256",
    "kdexp.train_sha256",
    "kdexp.validation_sha256",
)
GOALS = 0.924, 0.9431, 0.948
# Test accuracies that others report: label, parameters, accuracy.
PUBLISHED = (
    ("best plain result under 100,000 on the data set's own list", 83_466, 0.9247),
    ("the documented student, flip TTA, epoch picked on test", 98_954, 0.9431),
    ("ResNet-20", 272_186, 0.956),
    ("ResNet-20, random erasing", 272_186, 0.960),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables, the picture and the records; print the frontier."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stores", type=Path, default=Path("mlruns"))
    RESULTS.mkdir(exist_ok=True)
    tracking = Tracking(Settings(parser.parse_args(arguments).stores))
    points, gains = list[Row](), list[Row]()
    for study in tracking.find("study", {}):
        name, sweep = study.tags["kdexp.study"], sweep_of(study, tracking)
        fresh = fresh_seeds(study, tracking)
        if fresh:
            points.append(point(sweep, fresh))
        paired = (
            finished("trial", {"mlflow.parentRunId": study.run_id}, tracking)
            if "training.seed" in sweep.search
            else []
        )
        gains += differences(sweep, paired, tracking)
        if fresh or paired:
            record(name, sweep, [*paired, *fresh], tracking)
    points.sort(key=lambda row: (row["parameters"], row["multiply_adds"]))
    write("frontier.csv", points)
    write("distillation.csv", gains)
    if not points:
        raise SystemExit(
            "No study there is confirmed: kdexp sweep sweeps/frontier.yaml --set name=NAME, kdexp"
            " confirm NAME"
        )
    picture(points).savefig(RESULTS / "frontier.png", dpi=130)
    shown = [
        {key: row[key] for key in row if key not in ("sweep_file", "command")} for row in points
    ]
    print_report(
        "Fashion-MNIST: accuracy against size",
        shown,
        predicted(points) | {"comparisons": len(gains)},
    )


def fresh_seeds(study: RunRecord, tracking: Tracking) -> list[RunRecord]:
    """The runs of a study's confirmed recipe that have been looked at on test."""
    confirmed = study.tags.get("kdexp.confirmed_run")
    tags = {"mlflow.parentRunId": study.run_id, "kdexp.confirms": confirmed or ""}
    return (
        [run for run in finished("confirmation", tags, tracking) if "test_accuracy" in run.metrics]
        if confirmed
        else []
    )


def finished(kind: Kind, tags: dict[str, str], tracking: Tracking) -> list[RunRecord]:
    """The runs of a kind that ended well."""
    return [run for run in tracking.find(kind, tags) if run.status == "FINISHED"]


def point(sweep: Sweep, runs: Sequence[RunRecord]) -> Row:
    """A row of the frontier."""
    first = runs[0]
    tests = [run.metrics["test_accuracy"] for run in runs]
    views = [run.metrics["test_accuracy_tta"] for run in runs if "test_accuracy_tta" in run.metrics]
    file, command = commands(sweep)
    confirm = "" if len(runs) == 3 else f" --seeds {len(runs)}"
    return {
        "family": sweep.student.architecture,
        "parameters": int(first.metrics["parameters"]),
        "multiply_adds": int(first.metrics["multiply_adds"]),
        "bytes": int(first.metrics["model_bytes"]),
        "val_accuracy": round(mean(run.metrics["val_accuracy"] for run in runs), 5),
        "test_accuracy": round(mean(tests), 5),
        "test_sd": round(stdev(tests), 5),
        "seeds": len(runs),
        "test_accuracy_tta": round(mean(views), 5) if views else None,
        "sweep_file": file,
        "command": f"{command} && kdexp confirm {sweep.name}{confirm}",
    }


def commands(sweep: Sweep) -> tuple[str, str]:
    """The shipped sweep file that is nearest to a study's, and the command that makes the one of
    the other.
    """
    wanted, nearest = settable(sweep), list[tuple[int, str, list[str]]]()
    for path in map(str, sorted(Path("sweeps").glob("*.yaml"))):
        there = settable(load(Path(path)))
        changed = [f"{key}={value}" for key, value in wanted.items() if there.get(key) != value]
        nearest.append((len(changed), path, changed))
    _, file, changed = min(nearest)
    if not makes(file, changed, sweep):
        raise SystemExit(
            f"Study '{sweep.name}' cannot be written as changes of {file}: it is of another version"
            " of kdexp."
        )
    # what follows from the others, such as a family's dropout, need not be said
    for change in list(changed):
        fewer = [other for other in changed if other != change]
        changed = fewer if makes(file, fewer, sweep) else changed
    return file, " ".join(
        ["kdexp sweep", file, *(f"--set {shlex.quote(change)}" for change in changed)]
    )


def makes(file: str, changes: list[str], sweep: Sweep) -> bool:
    """Whether a sweep file with these changes is that sweep."""
    try:
        return load(Path(file), changes) == sweep
    except ConfigError:
        return False


def settable(sweep: Sweep) -> dict[str, str]:
    """What --set takes for each value of a sweep; the search space as a whole, as its paths have
    dots of their own.
    """
    leaves = flatten(sweep.recipe) | {
        f"study.{key}": value for key, value in flatten(sweep.study).items()
    }
    leaves |= {f"selection.{key}": value for key, value in flatten(sweep.selection).items()}
    search = sweep.model_dump(mode="json", exclude_defaults=True)["search"]
    values = {"name": sweep.name, **leaves, "search": search}
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


def differences(sweep: Sweep, runs: Sequence[RunRecord], tracking: Tracking) -> Iterator[Row]:
    """By way to distil: what it adds to labels only, seed by seed."""
    by_way: dict[str, dict[int, float]] = {}
    for run in runs:
        recipe = recipe_of(run, tracking)
        way = way_of(recipe.distillation)
        by_way.setdefault(way, {})[recipe.training.seed] = run.metrics["val_accuracy"]
    labels, command = by_way.pop("labels only", {}), commands(sweep)[1] if runs else ""
    for way, accuracies in sorted(by_way.items()):
        seeds = sorted(accuracies.keys() & labels.keys())
        if len(seeds) < 2:  # still under way
            continue
        gains = [accuracies[seed] - labels[seed] for seed in seeds]
        yield {
            "family": sweep.student.architecture,
            "parameters": int(runs[0].metrics["parameters"]),
            "epochs": sweep.training.epochs,
            "distillation": way,
            "val_accuracy": round(mean(accuracies[seed] for seed in seeds), 5),
            "val_accuracy_labels_only": round(mean(labels[seed] for seed in seeds), 5),
            "gain": round(mean(gains), 5),
            "gain_sd": round(stdev(gains), 5),
            "seeds": len(gains),
            "command": command,
        }


def way_of(how: Distillation) -> str:
    """A way to distil in words: what tells it from the others of a study."""
    if not how.alpha:
        return "labels only"
    own = how.model_copy(update={"scale_by_t_squared": None}).times_t_squared
    if own == how.times_t_squared or how.temperature == 1:
        factor = ""
    else:
        factor = f", {'with' if how.times_t_squared else 'without'} T²"
    return f"{how.loss}, alpha {how.alpha:g}, T {how.temperature:g}{factor}"


def predicted(points: Sequence[Row]) -> dict[str, Any]:
    """What the frontier predicts, if errors fall as a power of parameters: least squares of the
    logarithms of those points that no smaller one equals.
    """
    best = [
        row
        for row in points
        if all(
            other["test_accuracy"] < row["test_accuracy"] for other in points[: points.index(row)]
        )
    ]
    sizes = np.log([row["parameters"] for row in best])
    slope, offset = np.polyfit(sizes, np.log([1 - row["test_accuracy"] for row in best]), 1)
    return {
        "points": len(points),
        "on_the_frontier": len(best),
        "power": round(float(slope), 3),
        "parameters_for": {
            f"{goal:.2%}": round(math.exp((math.log(1 - goal) - offset) / slope)) for goal in GOALS
        },
        "accuracy_at": {
            f"{size:,}": round(1 - math.exp(offset + slope * math.log(size)), 4)
            for size in (10_000, 60_000, 100_000)
        },
    }


def record(name: str, sweep: Sweep, runs: Sequence[RunRecord], tracking: Tracking) -> None:
    """A study's sweep and what each run recorded of itself, as one file."""
    content = {
        "study": name,
        "sweep": sweep.model_dump(mode="json"),
        "runs": [
            {
                "run_id": run.run_id,
                "name": run.name,
                "recipe": (
                    recipe_of(run, tracking).model_dump(
                        mode="json", include={"student", "distillation", "training"}
                    )
                ),
                "metrics": dict(sorted(run.metrics.items())),
                "val_accuracy_by_epoch": [
                    round(value, 5)
                    for _, value in tracking.history(run.run_id, "epoch/val_accuracy")
                ],
                "tags": {key: run.tags[key] for key in RECORDED if key in run.tags},
                "environment": environment(run, tracking),
            }
            for run in runs
        ],
    }
    path = RESULTS / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def environment(run: RunRecord, tracking: Tracking) -> dict[str, str]:
    """Versions, processor and threads that a run recorded; not the build of the kernel, which is
    the machine's own.
    """
    found: dict[str, str] = json.loads(tracking.read_text(run.run_id, "environment.json"))
    return {key: value for key, value in found.items() if key != "platform"}


def write(name: str, rows: Sequence[Row]) -> None:
    """A table as CSV."""
    if rows:
        with (RESULTS / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def picture(points: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy against parameters, beside what is published."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for family, marker in (("cnn", "s"), ("residual", "o"), ("separable", "^")):
        group = [row for row in points if row["family"] == family]
        if group:
            sizes = [row["parameters"] for row in group]
            accuracies = [100 * row["test_accuracy"] for row in group]
            spread = [100 * row["test_sd"] for row in group]
            axes.errorbar(
                sizes,
                accuracies,
                spread,
                fmt=marker,
                color=BLUE,
                capsize=3,
                label=f"kdexp, {family}, no TTA",
            )
    for label, size, accuracy in PUBLISHED:
        axes.plot(size, 100 * accuracy, "x", color=GREY)
        axes.annotate(
            label,
            (size, 100 * accuracy),
            (-6, 5),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=GREY,
        )
    axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy, % (mean and sd over seeds)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
