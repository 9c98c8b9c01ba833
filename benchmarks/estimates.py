"""What `kdexp check` says a sweep takes, over what it takes. The aim is a factor of 1.5.

    python -m benchmarks.estimates [--case digits once folder fashion]

Each case is checked and then run, by the commands, in a folder of its own. `all` is the estimate
with every fold's teacher, `first` that with the first alone. A machine that does other work
meanwhile makes both sides waver.
"""

from __future__ import annotations

import argparse
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

SWEEPS = Path(__file__).parents[1] / "sweeps"
UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
CASES = {
    "digits": (SWEEPS / "digits.yaml", []),
    "once": (SWEEPS / "digits.yaml", ["--trials", "8", "--set", "study.repeats=1"]),
    "folder": (Path("photos.yaml"), ["--trials", "8", "--set", "training.epochs=5"]),
    "fashion": (
        SWEEPS / "fashion-mnist-quick.yaml",
        [
            *("--trials", "3", "--set", "study.repeats=1"),
            *("--set", "training.epochs=1", "--set", "teacher.epochs=1"),
        ],
    ),
}


def estimate(text: str) -> tuple[float, float]:
    """Seconds out of what `kdexp check` prints: with every teacher, and with the first alone."""
    found = re.findall(r"([\d.,]+) (ms|s|min|h)\b", text[text.index("in all") :].splitlines()[0])
    seconds = [float(number.replace(",", "")) * UNITS[unit] for number, unit in found]
    return seconds[0], seconds[-1]


def pictures(root: Path) -> None:
    """Images of two classes that can be told apart: bright above, bright below."""
    noise = np.random.default_rng(0)
    for name, half in (("above", slice(0, 16)), ("below", slice(16, 32))):
        (root / name).mkdir(parents=True)
        for number in range(300):
            pixels = noise.integers(0, 128, (32, 32, 3), dtype=np.uint8)
            pixels[half] += 60
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def kdexp(arguments: Sequence[str], folder: Path) -> tuple[str, float]:
    """A command's output and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "kdexp", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, time.perf_counter() - started


def phases(folder: Path, began: float, ended: float) -> str:
    """How long it took until the first trial began, until the last one ended, and after that."""
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as database:
        first, last = database.execute(
            "select min(start_time), max(end_time) from runs where name like 'trial %'"
        ).fetchone()
    return (
        f"{first / 1000 - began:.0f} s to the first trial, {(last - first) / 1000:.0f} s of trials,"
        f" {ended - last / 1000:.0f} s to select"
    )


def measure(case: str) -> None:
    """Check, run, compare."""
    file, options = CASES[case]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if case == "folder":
            pictures(folder / "photos")
            kdexp(["init", "photos"], folder)
        said, checking = kdexp(["check", str(file), *options], folder)
        every, first = estimate(said)
        began = time.time()
        ended, took = kdexp(["sweep", str(file), *options], folder)
        parts = phases(folder, began, began + took)
    teachers = len(set(re.findall(r"on fold (\d+)", ended)))
    print(said)
    print("\n".join(ended.splitlines()[-12:]))
    print(
        f"{case}: estimated {every:.0f} s (first teacher alone {first:.0f} s), took {took:.0f} s:"
        f" factor {every / took:.2f} ({first / took:.2f}); {teachers} other folds were held out;"
        f" checking took {checking:.0f} s; {parts}",
        flush=True,
    )


def main() -> None:
    """Every case that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    for case in parser.parse_args().case:
        measure(case)


if __name__ == "__main__":
    main()
