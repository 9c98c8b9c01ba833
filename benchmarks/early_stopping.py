"""What `early_stop` saves, in model-epochs, and whether the selected model is the same.

    python -m benchmarks.early_stopping [SWEEP.yaml] [--trials 40] [--seeds 1 2 3]

Each study (sampler, seed) runs twice, without and with `early_stop`, side by side in one run, on a
teacher made once. A random search proposes the same trials both times, so what is selected can be
compared trial by trial; others learn from what they are told and may go another way. Where the
objective is `smallest`, proposals that are no smaller than one that passes are begun neither way.
Trials run one after another: who is stopped depends on who was first, and so the counts can be
repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, print_report
from kdexp.config import Sweep, load
from kdexp.environment import configure
from kdexp.runs.tracking import Tracking
from kdexp.search.sweep import EpochDone, Event, TrialFinished, TrialSkipped, run_sweep
from kdexp.select.promote import candidates
from kdexp.selection import select
from kdexp.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    base, rows = load(options.sweep), []
    with tempfile.TemporaryDirectory() as stores:
        for sampler in options.samplers:
            for seed in options.seeds:
                study = {"sampler": sampler, "seed": seed, "trials": options.trials}
                full, early = (
                    _run(base, {**study, "early_stop": on}, Path(stores)) for on in (False, True)
                )
                rows.append(_row(sampler, seed, full, early))
                print(json.dumps(rows[-1]), file=sys.stderr)
    full, early = (sum(row[name] for row in rows) for name in ("model_epochs", "with_early_stop"))
    title = f"{options.trials} trials of '{base.name}', up to {base.training.epochs} epochs each"
    print_report(title, rows, {"saved_share": round(1 - early / full, 3), "rows": rows})


def name_of(study: Mapping[str, Any]) -> str:
    """The name of the study with these settings."""
    return "-".join(map(str, study.values()))


def run_study(base: Sweep, study: Mapping[str, Any], stores: Path) -> tuple[list[Event], Tracking]:
    """A sweep with these study settings, where one training decides, run in this process on one
    thread: its events, and where it was tracked.
    """
    sweep = base.model_copy(
        update={
            "name": name_of(study),
            "study": base.study.model_copy(update={"repeats": 1, **study}),
        }
    )
    settings = Settings(stores=stores, workers=1)
    tracking = Tracking(settings)
    return list(run_sweep(sweep, settings, tracking, configure("cpu", 1))), tracking


def _run(base: Sweep, study: dict[str, Any], stores: Path) -> dict[str, Any]:
    """One study: its model-epochs, what became of its trials, and the selected one."""
    events, tracking = run_study(base, study, stores)
    trials = candidates(tracking.study(name_of(study)), tracking)
    chosen = select(trials, base.selection)
    return {
        "epochs": sum(isinstance(event, EpochDone) for event in events),
        "skipped": sum(isinstance(event, TrialSkipped) for event in events),
        "stopped": sum(
            isinstance(event, TrialFinished) and event.result.state == "pruned" for event in events
        ),
        "chosen": (
            f"trial {chosen.trial}, {chosen.parameters:,} parameters, {chosen.val_accuracy:.2%}"
        ),
    }


def _row(sampler: str, seed: int, full: dict[str, Any], early: dict[str, Any]) -> Row:
    return {
        "sampler": sampler,
        "seed": seed,
        "model_epochs": full["epochs"],
        "with_early_stop": early["epochs"],
        "not_begun": early["skipped"],
        "ended_early": early["stopped"],
        "selected": full["chosen"],
        "selected_with_early_stop": early["chosen"],
        "same_model": "yes" if full["chosen"] == early["chosen"] else "no",
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.early_stopping", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "sweep", type=Path, nargs="?", default=Path(__file__).parents[1] / "sweeps" / "digits.yaml"
    )
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
