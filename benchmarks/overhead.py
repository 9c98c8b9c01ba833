"""What recording costs: Optuna and MLflow take at most 2 % of a 60-second trial, and at most 5 ms
of an epoch.

    python -m benchmarks.overhead [--trials 10]

Real trials of 20 short epochs on fresh embedded stores, with and without a pruner, alone and beside
a second process that writes to the same stores. Training itself (EpochReport.seconds) is
subtracted, everything else counts: the run, its params, datasets, artifacts, plot and metrics, and
Optuna's ask, suggest, report and tell. The share is of a trial whose training takes 60 seconds.
Medians over trials; each process's first (imports) is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.report import Row, print_report
from kdexp.config import Sweep
from kdexp.environment import configure
from kdexp.runs.tracking import EpochMetrics, Tracking
from kdexp.search.sweep import EpochDone, TeacherReady, TrialFinished, run_sweep
from kdexp.settings import Settings

EPOCHS, LONG_TRIAL = 20, 60.0
CONDITIONS = [(pruner, processes) for pruner in ("none", "median") for processes in (1, 2)]
WAIT_SECONDS = 120.0

Role = Literal["alone", "first", "second"]


@dataclass
class Trial:
    """Seconds of one trial that were not training: all, those between two epochs, those of delivery
    to MLflow.
    """

    epochs: int = 0
    outside: float = 0.0
    between: float = 0.0
    delivering: float = 0.0

    @property
    def ms_per_epoch(self) -> float:
        """What grows with the number of epochs, for each of them."""
        return 1000 * (self.between / max(self.epochs - 1, 1) + self.delivering / self.epochs)


class TimedTracking(Tracking):
    """MLflow, and how long it took to deliver what epochs measured."""

    delivering = 0.0

    def log_epochs(self, run_id: str, epochs: Sequence[EpochMetrics]) -> None:
        """As it is, timed."""
        started = time.perf_counter()
        super().log_epochs(run_id, epochs)
        self.delivering += time.perf_counter() - started


@dataclass
class Clock:
    """Reads a sweep's events: a trial took what lies between the end of the one before and its
    own.
    """

    tracking: TimedTracking
    trials: list[Trial] = field(default_factory=list)
    current: Trial = field(default_factory=Trial)
    before: float = 0.0
    """When the last trial ended."""
    last_epoch: float = 0.0
    delivered: float = 0.0

    def start(self) -> None:
        """Trials begin."""
        self.before = time.perf_counter()

    def epoch(self, seconds: float) -> None:
        """An epoch of so many seconds of training is over, and recorded."""
        now, trial, delivery = time.perf_counter(), self.current, self._delivery()
        trial.epochs += 1
        trial.outside -= seconds
        if trial.epochs > 1:
            trial.between += now - self.last_epoch - seconds - delivery
        self.last_epoch = now

    def finish(self) -> None:
        """A trial is over, and told."""
        now = time.perf_counter()
        self._delivery()
        self.current.outside += now - self.before
        self.trials.append(self.current)
        self.current, self.before = Trial(), now

    def _delivery(self) -> float:
        """Seconds of delivery since the last look, added to the trial's."""
        seconds = self.tracking.delivering - self.delivered
        self.delivered = self.tracking.delivering
        self.current.delivering += seconds
        return seconds


def main() -> None:
    """Measure every condition; print the table, and last the worst of each number as JSON."""
    options = _options()
    if options.join:
        trials = measure(options.join, options.pruner, options.trials, "second")
        print(json.dumps([asdict(trial) for trial in trials]))
        return
    rows = [
        row(pruner, processes, condition(pruner, processes, options.trials))
        for pruner, processes in CONDITIONS
    ]
    names = ("seconds_per_trial", "ms_per_epoch", "share_of_60_s_trial")
    print_report(
        f"Outside training, trials of {EPOCHS} epochs, embedded stores",
        rows,
        {name: max(r[name] for r in rows) for name in names},
    )


def condition(pruner: str, processes: int, trials: int) -> list[Trial]:
    """The trials of every process in one condition, on stores of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        stores = Path(temporary) / "mlruns"
        if processes == 1:
            return measure(stores, pruner, trials, "alone")
        command = [
            sys.executable,
            "-m",
            "benchmarks.overhead",
            "--join",
            str(stores),
            "--pruner",
            pruner,
        ]
        with subprocess.Popen(
            [*command, "--trials", str(2 * trials)], stdout=subprocess.PIPE, text=True
        ) as other:
            own = measure(stores, pruner, 2 * trials, "first")
            out, _ = other.communicate()
        return own + [Trial(**trial) for trial in json.loads(out.splitlines()[-1])]


def measure(stores: Path, pruner: str, trials: int, role: Role) -> list[Trial]:
    """Run a study of so many trials, or this process's part of it."""
    device = configure("cpu", 1)
    settings = Settings(stores=stores, pack=1)
    clock = Clock(TimedTracking(settings))
    for event in run_sweep(_sweep(pruner, trials), settings, clock.tracking, device):
        if isinstance(event, TeacherReady):
            if role != "alone":
                _meet(stores, role)
            clock.start()
        elif isinstance(event, EpochDone):
            clock.epoch(event.report.seconds)
        elif isinstance(event, TrialFinished):
            clock.finish()
    return clock.trials[1:]


def row(pruner: str, processes: int, trials: list[Trial]) -> Row:
    """A condition's medians."""
    seconds = median(trial.outside for trial in trials)
    return {
        "pruner": pruner,
        "processes": processes,
        "trials": len(trials),
        "seconds_per_trial": seconds,
        "slowest_trial": max(trial.outside for trial in trials),
        "ms_per_epoch": median(trial.ms_per_epoch for trial in trials),
        "share_of_60_s_trial": seconds / (LONG_TRIAL + seconds),
    }


def _sweep(pruner: str, trials: int) -> Sweep:
    """Tiny students on real digits: next to no training."""
    return Sweep.model_validate(
        {
            "name": "overhead",
            "data": {"dataset": "digits", "channels": 1, "augment": {"flip": False, "shift": 1}},
            "teacher": {"architecture": "cnn", "channels": [8, 16], "hidden": 16, "epochs": 1},
            "student": {"channels": [2, 4], "hidden": 8},
            "training": {"epochs": EPOCHS},
            "search": {
                "distillation.alpha": {"low": 0.0, "high": 1.0},
                "distillation.temperature": {"low": 1.0, "high": 20.0, "log": True},
                "training.learning_rate": {"low": 3e-4, "high": 3e-2, "log": True},
                "student.channels": {"choices": ((2, 4), (4, 8))},
            },
            "study": {
                "objective": "accuracy",
                "trials": trials,
                "sampler": "tpe",
                "pruner": pruner,
            },
            "selection": {"accuracy_bar": 0.9},
        }
    )


def _meet(stores: Path, role: Role) -> None:
    """Wait until both processes are ready to train."""
    (stores / f"ready-{role}").touch()
    deadline = time.monotonic() + WAIT_SECONDS
    while not all((stores / f"ready-{each}").exists() for each in ("first", "second")):
        if time.monotonic() > deadline:
            raise SystemExit("The other process never became ready.")
        time.sleep(0.02)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--trials", type=int, default=10, help="trials of each process in each condition"
    )
    parser.add_argument("--join", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pruner", default="none", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
