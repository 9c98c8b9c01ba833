"""Bad input in the words a user reads: one clear line on stderr, exit code not 0, no traceback,
nothing half-done.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

CASES = {
    "unknown key": (
        ["sweep", "tiny.yaml", "--set", "distillation.gamma=1"],
        "distillation.gamma: unknown key",
    ),
    "misspelt key": (["sweep", "tiny.yaml", "--set", "training.epoch=1"], "did you mean epochs?"),
    "wrong type": (
        ["train", "tiny.yaml", "--set", "training.epochs=ten"],
        'got "ten"; allowed: a whole number, at least 1',
    ),
    "alpha 1.5": (
        ["train", "tiny.yaml", "--set", "distillation.alpha=1.5"],
        "got 1.5; allowed: a number, at least 0, at most 1",
    ),
    "temperature 0": (
        ["train", "tiny.yaml", "--set", "distillation.temperature=0"],
        "got 0; allowed: a number, above 0",
    ),
    "low above high": (
        ["sweep", "tiny.yaml", "--set", "search.distillation.alpha={low: 1, high: 0}"],
        "low must be below high, got low 1 and high 0",
    ),
    "missing sweep file": (["sweep", "tinny.yaml"], "no such sweep file; did you mean tiny.yaml?"),
    "empty search": (["sweep", "tiny.yaml", "--set", "search={}"], "search of 'tiny' is empty"),
    "missing data folder": (
        ["train", "tiny.yaml", "--set", "data={dataset: fashion_mnist}", "--data-dir", "nowhere"],
        "correct --data-dir",
    ),
    "corrupt data file": (
        ["train", "tiny.yaml", "--set", "data={dataset: mnist}", "--data-dir", "broken"],
        "not an idx file of unsigned bytes (or cut short); delete it",
    ),
    "missing teacher file": (
        ["train", "tiny.yaml", "--set", "teacher.weights=none.pt"],
        "none.pt: no such checkpoint",
    ),
    "teacher of the wrong shape": (
        ["train", "tiny.yaml", "--set", "teacher.weights=other.pt"],
        "other.pt: wrong shape: 0.weight is (3, 1, 3, 3)",
    ),
    "unknown architecture": (
        ["train", "tiny.yaml", "--set", "student={architecture: resnet}", "--set", "search={}"],
        "no network named 'resnet'",
    ),
    "unknown run": (
        ["reproduce", "0123456789abcdef0123456789abcdef"],
        "No run '0123456789abcdef0123456789abcdef'",
    ),
    "unknown study": (["select", "nothing"], "No study 'nothing' in the embedded store"),
    "unreachable tracking server": (
        ["train", "tiny.yaml", "--tracking-uri", "http://127.0.0.1:{port}"],
        "No MLflow server answers",
    ),
    "unreachable storage": (
        ["sweep", "tiny.yaml", "--storage", "postgresql://me:secret@127.0.0.1:{port}/x"],
        "correct --storage",
    ),
    "no such device": (["train", "tiny.yaml", "--device", "tpu"], "use cpu, cuda or auto"),
    "bar nobody reaches": (
        ["sweep", "tiny.yaml", "--trials", "2", "--set", "selection.accuracy_bar=1.0"],
        "Best: 0.",
    ),
    "unknown option": (["sweep", "tiny.yaml", "--epochs", "3"], "No such option: --epochs"),
    "missing argument": (["sweep"], "Missing argument 'SWEEP.yaml'"),
}


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(
    kdexp_here, tiny_file: Path, tmp_path: Path, closed_port: int, name: str
) -> None:
    raw = tmp_path / "broken" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in (
        f"{part}-{content}"
        for part in ("train", "t10k")
        for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ):
        (raw / stem).write_bytes(b"\x00\x00\x08\x03garbage")
    torch.save({"0.weight": torch.zeros(3, 1, 3, 3)} | other_names(), tmp_path / "other.pt")
    arguments, says = CASES[name]
    done = kdexp_here(*(argument.replace("{port}", str(closed_port)) for argument in arguments))
    assert done.returncode not in (0, 130)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kdexp: ")
    assert says in lines[0]
    assert "secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def other_names() -> dict[str, torch.Tensor]:
    from conftest import tiny_sweep

    from kdexp.config import Data
    from kdexp.distill.datasets import load_splits
    from kdexp.distill.models import build

    like = load_splits(Data(dataset="digits", channels=1)).train
    return {
        name: value
        for name, value in build(tiny_sweep().teacher, like).state_dict().items()
        if name != "0.weight"
    }


def test_a_failure_in_a_process_of_its_own_is_one_line_too(kdexp, tiny_file: Path) -> None:
    done = kdexp("train", "tiny.yaml", "--set", "teacher.weights=none.pt")
    assert done.returncode == 1
    assert (
        done.stderr
        == "kdexp: none.pt: no such checkpoint; correct teacher.weights, or set it to null to train"
        " one\n"
    )


def test_debug_shows_the_traceback(kdexp, tiny_file: Path) -> None:
    assert (
        "Traceback" in kdexp("train", "tiny.yaml", "--set", "training.epochs=0", "--debug").stderr
    )
