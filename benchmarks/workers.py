"""Trials per hour as workers grow, and what memory each takes.

    python -m benchmarks.workers [--workers 1 2] [--trials 6] [--epochs 2]

The same sweep of the documented student on real Fashion-MNIST by
`kdexp sweep --workers N --threads 1`, side by side in one run, each from an empty study on a warm
teacher cache (a small cnn teaches). Time is that of the whole command. Memory is the peak of the
resident set, as the kernel notes it, and of the proportional set (shared pages counted once among
those who share them), sampled every ten seconds: a sample takes some 25 ms for each process, which
a sweep with a core left over would not feel and one without would.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Row, print_report

MIB = 1024  # KiB
SAMPLING = 10.0  # seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and last the line of JSON."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sweep = _write(folder, "warm-up", options)
        subprocess.run(_command("teacher", sweep, folder), check=True, stdout=subprocess.DEVNULL)
        # compiles the student
        subprocess.run(_command("train", sweep, folder), check=True, stdout=subprocess.DEVNULL)
        rows = [_measure(workers, folder, options) for workers in options.workers]
    for row in rows:
        row["over_one"] = round(row["trials_per_hour"] / rows[0]["trials_per_hour"], 2)
    figures = {
        "over_one_worker": rows[-1]["over_one"],
        "trials": options.trials,
        "epochs": options.epochs,
        "rows": rows,
    }
    print_report(
        f"{options.trials} trials of {options.epochs} epochs, documented student, one thread a"
        " worker",
        rows,
        figures,
    )


def _measure(workers: int, folder: Path, options: argparse.Namespace) -> Row:
    sweep = _write(folder, f"workers-{workers}", options)
    started = time.perf_counter()
    command = [*_command("sweep", sweep, folder), "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peaks: dict[int, tuple[int, int]] = {}
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, peaks, stop))
    watch.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    stop.set()
    watch.join()
    if code:
        raise SystemExit(f"kdexp sweep --workers {workers} failed with code {code}")
    resident, proportional = max(peaks.values())
    return {
        "workers": workers,
        "seconds": round(seconds, 1),
        "trials_per_hour": round(3600 * options.trials / seconds, 1),
        "over_one": 1.0,
        "peak_rss_mib_of_a_process": resident // MIB,
        "its_pss_mib": proportional // MIB,
        "processes": len(peaks),
    }


def _watch(session: int, peaks: dict[int, tuple[int, int]], stop: threading.Event) -> None:
    """Note the peak (resident, proportional) KiB of every process of the session."""
    while not stop.wait(SAMPLING):
        for place in Path("/proc").glob("[0-9]*"):
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) != session:
                    continue
                resident = _kibibytes(place / "status", "VmHWM")
                proportional = _kibibytes(place / "smaps_rollup", "Pss")
            except (OSError, ValueError, KeyError):  # it has just ended
                continue
            before = peaks.get(int(place.name), (0, 0))
            peaks[int(place.name)] = max(before[0], resident), max(before[1], proportional)


def _kibibytes(file: Path, name: str) -> int:
    """A number of a file of lines `name: number kB`."""
    return int(
        dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)[
            name
        ].split()[0]
    )


def _write(folder: Path, name: str, options: argparse.Namespace) -> Path:
    sweep: dict[str, Any] = {
        "name": name,
        "data": {"dataset": "fashion_mnist"},
        "teacher": {
            "architecture": "cnn",
            "channels": [8, 16],
            "hidden": 32,
            "epochs": 1,
            "learning_rate": 1e-3,
        },
        "training": {"epochs": options.epochs},
        "search": {"distillation.alpha": {"low": 0.0, "high": 1.0}},
        "study": {"objective": "accuracy", "trials": options.trials, "sampler": "random"},
        "selection": {"accuracy_bar": 0.1},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(sweep))
    return file


def _command(command: str, sweep: Path, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "kdexp",
        command,
        str(sweep),
        "--stores",
        str(folder / "stores"),
        "--threads",
        "1",
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.workers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
