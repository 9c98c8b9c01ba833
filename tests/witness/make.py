"""Runs that a version of kdexp recorded, to be reproduced by every later one.

    python tests/witness/make.py KDEXP_PYTHON FOLDER && tar cJf tests/witness/VERSION.tar.xz -C
    FOLDER .

KDEXP_PYTHON is the python of an environment (or git worktree) with that version. Every kind of
training that can have bits of its own is there once, on scikit-learn's digits and as small as it
can be: the families, networks of the user's own (stacked and stepped), EMA, every loss, random
erasing, an ensemble as teacher, a pack of three, bf16, a training resumed after kill -9, a
confirmation's, a student trained on all images. `runs.json` names them; the store lies in mlruns/.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

SWEEP = """\
name: witness
data: {dataset: digits, channels: 1, validation_fraction: 0.2, augment: {flip: false, shift: 1}}
teacher: {architecture: cnn, channels: [8], hidden: 16, dropout: 0.1, epochs: 3, batch_size: 64, learning_rate: 1.0e-2}
student: {architecture: cnn, channels: [4, 8], hidden: 16, dropout: 0.1}
training: {batch_size: 64, learning_rate: 1.0e-2, epochs: 3}
search:
  distillation.alpha: {low: 0.0, high: 1.0}
  training.learning_rate: {low: 3.0e-3, high: 3.0e-2, log: true}
study: {trials: 3, objective: accuracy}
selection: {accuracy_bar: 0.2}
"""

NETS = """\
import torch.nn.functional as F
from torch import nn


def plain(channels, image_size, classes, width):
    height, breadth = image_size
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(width * (height // 2) * (breadth // 2), classes),
    )


class Stepped(nn.Module):
    def __init__(self, channels, image_size, classes, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Linear(width, classes)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv(x)))
        return self.out(F.dropout(x.mean((2, 3)), 0.1, self.training))


def stepped(channels, image_size, classes, width):
    return Stepped(channels, image_size, classes, width)
"""

TRAININGS = {
    "cnn": [],
    "sgd, label smoothing, constant": ["training.optimizer=sgd", "training.label_smoothing=0.1", "training.schedule=constant"],
    "residual": ["student={architecture: residual, channels: [4, 8]}"],
    "separable": ["student={architecture: separable, channels: [4, 8]}"],
    "own, stacked": ["student={architecture: 'nets:plain', options: {width: 8}}"],
    "own, stepped": ["student={architecture: 'nets:stepped', options: {width: 8}}"],
    "ema, one cycle, adamw, last": [
        "training.ema=0.9", "training.schedule=one_cycle", "training.optimizer=adamw", "training.keep=last",
    ],
    "correlation, T 5": ["distillation.loss=correlation", "distillation.temperature=5.0"],
    "decoupled": ["distillation.loss=decoupled"],
    "standardized": ["distillation.loss=standardized", "distillation.temperature=2.0"],
    "kl without the factor": ["distillation.scale_by_t_squared=false"],
    "random erasing": ["training.random_erasing=0.5", "data.augment.shift=0"],
    "an ensemble teaches": ["teacher.members=2", "teacher.ema=0.9"],
    "max steps": ["training.max_steps=50"],
    "bf16": ["training.precision=bf16"],
    "bf16, own, stepped": ["training.precision=bf16", "student={architecture: 'nets:stepped', options: {width: 8}}"],
}  # fmt: skip
FASHION = [
    "name=compiled",
    "data={dataset: fashion_mnist, channels: 1, augment: {flip: true, shift: 0}}",
    "teacher={architecture: cnn, channels: [4, 8], hidden: 16, epochs: 1, learning_rate: 1.0e-2}",
    "student={architecture: cnn}",
    (
        "training={batch_size: 128, epochs: 2, max_steps: 700, learning_rate: 3.0e-3, precision:"
        " PRECISION}"
    ),
]
"""Long enough to be compiled."""


def main(python: str, folder: Path) -> None:
    """Make all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "witness.yaml").write_text(SWEEP)
    (folder / "nets.py").write_text(NETS)

    def kdexp(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-m", "kdexp", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"kdexp {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    environment = os.environ | {"KDEXP_THREADS": "1", "KDEXP_WORKERS": "1", "COLUMNS": "200"}
    runs: dict[str, str] = {}
    for name, values in TRAININGS.items():
        out = kdexp(
            "train", "witness.yaml", *(part for value in values for part in ("--set", value))
        )
        runs[name] = next(
            line.split()[-1] for line in out.splitlines() if line.startswith("Run ID")
        )
        print(name, runs[name], flush=True)

    for precision in ("fp32", "bf16"):
        values = [value.replace("PRECISION", precision) for value in FASHION]
        out = kdexp(
            "train", "witness.yaml", *(part for value in values for part in ("--set", value))
        )
        runs[f"compiled, {precision}"] = next(
            line.split()[-1] for line in out.splitlines() if line.startswith("Run ID")
        )

    kdexp("sweep", "witness.yaml", "--set", "name=packed", "--pack", "3")
    runs |= {
        f"lane {number} of a pack of three": run
        for number, run in _trials(folder, "packed").items()
    }

    killed = (
        "sweep",
        "witness.yaml",
        "--set",
        "name=killed",
        "--set",
        "training.epochs=60",
        "--trials",
        "1",
    )
    process = subprocess.Popen(
        [python, "-m", "kdexp", *killed], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    while not list(folder.glob("mlruns/checkpoints/*/trial-0*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kdexp(*killed)
    runs["resumed after kill -9"] = _trials(folder, "killed")[0]

    kdexp(
        "sweep",
        "witness.yaml",
        "--set",
        "name=confirmed",
        "--set",
        "training.keep=last",
        "--trials",
        "2",
    )
    kdexp("confirm", "confirmed", "--seeds", "2", "--train-and-validation")
    confirmed = _query(
        folder, "select run_uuid from tags where key = 'kdexp.kind' and value = 'confirmation'"
    )
    runs |= {f"confirmation {number}": run for number, (run,) in enumerate(confirmed)}
    (folder / "runs.json").write_text(json.dumps(runs, indent=1))
    for database in ("mlflow.db", "optuna.db"):
        with sqlite3.connect(folder / "mlruns" / database) as connection:
            connection.execute("pragma wal_checkpoint(truncate)")
    for picture in folder.glob("mlruns/artifacts/**/*.png"):
        picture.unlink()  # half of the sample's bytes, and nothing is compared with them
    shutil.rmtree(folder / "mlruns" / "teachers")  # a run's record has its teacher


def _trials(folder: Path, study: str) -> dict[int, str]:
    found = _query(
        folder,
        "select number.value, runs.run_uuid from runs join tags number on number.run_uuid ="
        " runs.run_uuid join tags study on study.run_uuid = runs.run_uuid join tags kind on"
        " kind.run_uuid = runs.run_uuid where number.key = 'kdexp.trial' and study.key ="
        " 'kdexp.study' and study.value = ? and runs.status = 'FINISHED' and kind.key ="
        " 'kdexp.kind' and kind.value = 'trial'",
        study,
    )
    return {int(number): run for number, run in found}


def _query(folder: Path, query: str, *values: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(folder / "mlruns" / "mlflow.db", timeout=60) as database:
        return database.execute(query, values).fetchall()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
