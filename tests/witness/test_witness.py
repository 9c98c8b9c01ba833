"""Runs recorded by an earlier version, in a store that has moved since: each can be read and
reproduced, bit for bit.

`c3d1cbb.tar.xz` was made by make.py with the kdexp of that commit. On another kind of processor, or
with another torch, last bits differ: there the metrics must agree within a tolerance.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from system.conftest import Kdexp, command, environment, kdexp_here  # noqa: F401 - a fixture

from kdexp.config import Recipe
from kdexp.environment import record

STORE = Path(__file__).parent / "c3d1cbb.tar.xz"
with tarfile.open(STORE) as archive:
    RUNS = json.load(archive.extractfile("./runs.json"))  # type: ignore[arg-type]
FAST = ("cnn", "own, stepped", "resumed after kill -9")
TOLERANCE = 0.05


def test_the_sample_holds_every_kind_of_training() -> None:
    assert len(RUNS) == 26


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store, at another place than it was made at."""
    folder = tmp_path_factory.mktemp("witness")
    with tarfile.open(STORE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def kdexp_alone(*arguments: str) -> subprocess.CompletedProcess:
    """The real command, in a process of its own."""
    return subprocess.run(
        command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                *([] if name in FAST else [pytest.mark.slow]),
                *([pytest.mark.fashion] if "compiled" in name else []),
            ],
        )
        for name in RUNS
    ],
)
def test_a_run_of_an_earlier_version_is_reproduced(
    name: str,
    unpacked: Path,
    kdexp_here: Kdexp,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if "compiled" in name:
        request.getfixturevalue("fashion")
    monkeypatch.chdir(unpacked)
    here = record("cpu", Recipe(), 1)
    recorded = json.loads(
        next(
            unpacked.glob(f"mlruns/artifacts/*/{RUNS[name]}/artifacts/environment.json")
        ).read_text()
    )
    # shapes checked at run time cannot be compiled
    run = kdexp_alone if "compiled" in name else kdexp_here
    done = run("reproduce", RUNS[name], "--tolerance", str(TOLERANCE))
    assert done.returncode == 0, done.stderr
    if all(recorded[what] == here[what] for what in ("cpu", "cpu_capability", "torch", "numpy")):
        assert "identical" in done.stdout, done.stdout
    else:
        assert "identical" in done.stdout or "within tolerance" in done.stdout, done.stdout
