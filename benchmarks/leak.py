"""What leaks through a teacher that all folds share, in points of validation accuracy.

    python -m benchmarks.leak [--data digits | fashion-mnist] [--pairs 100] [--minutes M]

Repeats of a recipe hold out one fold after another, and share the one teacher, which held out fold
0. It was trained on the images of every other fold, so its soft labels might carry something of
them to a student that is measured there. Each pair is a fold k > 0 and a student's seed. The
student is trained twice on all but fold k, in the same order from the same weights, and measured on
fold k: under the shared teacher, and under one that was trained holding out fold k itself. The
teachers of a pair have one seed, and as many images; each keeps the epoch that is best on what it
held out.

`difference` is shared less own: what the shared teacher adds. A *block* is all pairs of one fold
under the same two teachers. Its pairs are not independent, so the 95 % interval (Student's t) is
that of the blocks' means. Each block is printed as JSON as it comes (stderr).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean

from benchmarks.report import Row, print_report
from kdexp.config import Recipe, load
from kdexp.distill.datasets import Splits, load_splits
from kdexp.distill.execution import choose
from kdexp.distill.packs import Lane
from kdexp.distill.randomness import seed_of
from kdexp.distill.teacher import CachedTeacher, prepare_teacher
from kdexp.distill.train import TeacherLogits, train
from kdexp.environment import configure
from kdexp.intervals import mean_interval
from kdexp.search.scheduler import finished

SWEEPS = Path(__file__).parents[1] / "sweeps"
RECIPES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "digits": ("digits.yaml", {}),
    "fashion-mnist": (
        "fashion-mnist-quick.yaml",
        {"student.channels": [4, 8, 16], "student.hidden": 32, "training.learning_rate": 0.01},
    ),
}
"""The sweep file of each, and what is not as trial 0 has it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    device, started = configure("cpu", options.threads), time.monotonic()
    name, changes = RECIPES[options.data]
    recipe = load(SWEEPS / name).recipe.replace(changes)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        splits = load_splits(recipe.data, options.data_dir, device)
        for row in blocks(recipe, splits, options.students, Path(folder)):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            late = options.minutes and time.monotonic() - started > 60 * options.minutes
            if late or sum(row["pairs"] for row in rows) >= options.pairs:
                break
    summary = summed_up(rows)
    title = f"students of {name} on folds 1 to {splits.folds - 1}, in points"
    print_report(title, [summary], {"data": options.data, **summary, "blocks": rows})


def blocks(recipe: Recipe, splits: Splits, students: int, folder: Path) -> Iterator[Row]:
    """A row for each fold under each pair of teachers, without end. `splits` hold out fold 0."""
    for number in count(1):
        seed = seed_of(recipe.teacher.seed, "leak", number)
        own = recipe.replace({"teacher.seed": seed})
        shared = _teacher(own, splits, folder, whole=True)
        for fold in range(1, splits.folds):
            yield _block(own, splits, fold, shared, students, folder)


def summed_up(rows: Sequence[Row]) -> Row:
    """The mean over blocks, and the 95 % interval of the difference."""
    differences = [row["difference"] for row in rows]
    low, high = mean_interval(differences) if len(rows) > 1 else (-math.inf, math.inf)
    means = {
        name: round(fmean(row[name] for row in rows), 3)
        for name in ("shared", "own", "teacher_shared", "teacher_own")
    }
    return {
        "pairs": sum(row["pairs"] for row in rows),
        "blocks": len(rows),
        **means,
        "difference": round(fmean(differences), 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def _block(
    recipe: Recipe,
    splits: Splits,
    fold: int,
    shared: CachedTeacher,
    students: int,
    folder: Path,
) -> Row:
    """Students of so many seeds under both teachers, measured on the fold in percent."""
    here = splits.cut_by(recipe.data.model_copy(update={"fold": fold}))
    assert here.kept is not None
    own = _teacher(recipe, Splits(here.train, here.validation), folder, whole=False)
    seeds = [seed_of(recipe.teacher.seed, "student", fold, place) for place in range(students)]
    under_shared = _accuracy(recipe, seeds, here, shared.on(here.kept).soft)
    under_own = _accuracy(recipe, seeds, here, own.soft)
    seen = shared.soft.logits[0, here.held].argmax(-1) == here.validation.labels
    return {
        "teacher_seed": recipe.teacher.seed,
        "fold": fold,
        "pairs": students,
        "shared": under_shared,
        "own": under_own,
        "difference": under_shared - under_own,
        "teacher_shared": 100 * float(seen.double().mean()),
        "teacher_own": 100 * own.val_accuracy,
    }


def _teacher(recipe: Recipe, splits: Splits, folder: Path, whole: bool) -> CachedTeacher:
    """One that holds out the validation images of these splits."""
    return finished(
        prepare_teacher(recipe.teacher, recipe.data, splits, folder, whole=whole)  # of fold 0
    )


def _accuracy(recipe: Recipe, seeds: Sequence[int], splits: Splits, soft: TeacherLogits) -> float:
    """The mean validation accuracy of students of these seeds, trained side by side."""
    lanes = [Lane.of(recipe.replace({"training.seed": seed})) for seed in seeds]
    correct = [0] * len(lanes)
    how = choose(lanes, splits.train)
    for reports in train(lanes, splits, recipe.data, soft, how):
        for slot, report in enumerate(reports):
            if report and report.weights:
                correct[slot] = report.val_correct
    return 100 * fmean(correct) / len(splits.validation)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--data", choices=list(RECIPES), default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--students", type=int, default=2, help="pairs of each block")
    parser.add_argument("--minutes", type=float, help="begin no block after so many")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
