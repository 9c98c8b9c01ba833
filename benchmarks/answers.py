"""What the answer of a real study is worth: the true accuracy of the recipe that it ends with.

    python -m benchmarks.answers [--studies 20] [--seeds 20] [--file sweeps/digits.yaml]
                                 [--ways repeats one] [--keep docs/results/answers.jsonl]

Each study has another seed and another split of the real digits into training, validation and test.
Its answer's *true* accuracy is the mean test accuracy of fresh trainings of that recipe, each with
another seed on yet another split, with a teacher of that split's own: no image that any of these
students or teachers has seen is counted. Two ways to answer, on the same studies' seeds:

    repeats     the file as it stands: what is selected is sure
    one         the same number of trainings with study.repeats: 1, where one training decides

`whole` is what the same fresh trainings would come to with nothing held out: on the validation
images too. The first repeat, which is registered, was trained without them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.report import Kept, Row, print_report
from kdexp.config import Recipe, Sweep, identity, load
from kdexp.distill.datasets import load_splits, load_test
from kdexp.distill.evaluate import evaluate
from kdexp.distill.models import build
from kdexp.distill.packs import Lane
from kdexp.distill.teacher import prepare_teacher
from kdexp.distill.train import train
from kdexp.environment import configure
from kdexp.intervals import mean_interval
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.search.scheduler import finished
from kdexp.search.sweep import run_sweep
from kdexp.select.promote import candidates, under
from kdexp.selection import NothingPasses, select
from kdexp.settings import Settings

CPU = torch.device("cpu")
WAYS = ("repeats", "one")
ELSEWHERE = 100_000  # split seeds of the fresh trainings begin here


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    configure("cpu", 1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for row in _answers(options, Path(temporary)):
            print(row, flush=True)
            rows.append(row)
    summary = [_summary(way, [row for row in rows if row["way"] == way]) for way in options.ways]
    title = (
        f"{options.studies} studies of {options.file.stem}, each answer trained"
        f" {options.seeds} times more"
    )
    print_report(title, summary, {"summary": summary, "rows": rows})


def _answers(options: argparse.Namespace, teachers: Path) -> Iterator[Row]:
    base, kept = load(options.file), Kept(options.keep)
    file = f"{options.file.stem} {sha256(identity(base).encode()).hexdigest()[:12]}"
    for number in range(options.studies):
        for way in options.ways:
            study = {"seed": number} | ({"repeats": 1} if way == "one" else {})
            sweep = base.replace({"data.split_seed": number}).model_copy(
                update={"study": base.study.model_copy(update=study)}
            )
            key = {"file": file, "seeds": options.seeds, "way": way, "study": number}
            yield kept.row(key, partial(_answer, sweep, options.seeds, teachers))


def _answer(sweep: Sweep, seeds: int, teachers: Path) -> Row:
    """A study's answer, and what it is worth."""
    bar = sweep.selection.accuracy_bar
    with tempfile.TemporaryDirectory() as stores:
        settings = Settings(stores=Path(stores), workers=1)
        tracking = Tracking(settings)
        finished(run_sweep(sweep, settings, tracking, CPU))
        study = tracking.study(sweep.name)
        trials = under(sweep.selection, candidates(study, tracking), study, tracking)
        try:
            chosen = select(trials, sweep.selection)
        except NothingPasses:
            return {"bar": bar, "parameters": None, "promised": None, "true": None, "whole": None}
        recipe = recipe_of(tracking.read(chosen.run_id), tracking)
    answer = {"bar": bar, "parameters": chosen.parameters}
    if chosen.verdict is None:
        true = fmean(accuracies(recipe, seeds, teachers))
        return {**answer, "promised": chosen.val_accuracy, "true": true, "whole": None}
    held_out = recipe.replace({"training.keep": "last"})  # as its repeats were trained
    whole = held_out.replace({"data.train_on_validation": True})
    true, of_whole = (fmean(accuracies(each, seeds, teachers)) for each in (held_out, whole))
    return {**answer, "promised": chosen.verdict.mean, "true": true, "whole": of_whole}


def accuracies(recipe: Recipe, seeds: int, teachers: Path) -> Iterator[float]:
    """Test accuracies of a recipe with so many other seeds on other splits."""
    for seed in range(seeds):
        fresh = recipe.replace(
            {"training.seed": seed, "data.split_seed": ELSEWHERE + seed, "data.fold": 0}
        )
        splits = load_splits(fresh.data)
        teacher = finished(prepare_teacher(fresh.teacher, fresh.data, splits, teachers))
        module = build(fresh.student, splits.train)
        for (report,) in train([Lane.of(fresh)], splits, fresh.data, teacher.soft):
            if report and report.weights:
                module.load_state_dict(report.weights)
        yield evaluate(module.eval(), load_test(fresh.data)).accuracy


def _summary(way: str, rows: Sequence[Row]) -> Row:
    answers = [row for row in rows if row["true"] is not None]
    bar = rows[0]["bar"]
    gained = [row["whole"] - row["true"] for row in answers if row["whole"] is not None]
    whole = (
        {
            "mean_whole_less_true_points": 100 * fmean(gained),
            "interval": [round(100 * end, 2) for end in mean_interval(gained)],
        }
        if len(gained) > 1
        else {}
    )
    return {
        "way": way,
        "studies": len(rows),
        "no_answer": len(rows) - len(answers),
        "under_bar": sum(row["true"] < bar for row in answers),
        "mean_over_bar_points": 100 * fmean(row["true"] - bar for row in answers),
        "mean_promised_less_true_points": 100 * fmean(r["promised"] - r["true"] for r in answers),
        "median_parameters": median(row["parameters"] for row in answers),
        **whole,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--file", type=Path, default=Path("sweeps/digits.yaml"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--keep", type=Path, help="a file of what was measured, a line each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
