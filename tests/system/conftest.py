"""kdexp as a user runs it: the real command in a process of its own, on real stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_sweep

# A shell's background jobs, and all they start, ignore Ctrl-C; what is started here must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

Kdexp = Callable[..., subprocess.CompletedProcess]


def environment() -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("KDEXP_", "MLFLOW_"))
    }
    return kept | {"KDEXP_THREADS": "1", "KDEXP_WORKERS": "1", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kdexp", *arguments]


def started(folder: Path, *extra: str) -> subprocess.Popen:
    """A tiny sweep with trials of some seconds, under way, in a process group of its own."""
    return subprocess.Popen(
        command("sweep", "tiny.yaml", "--set", "training.epochs=40", *extra),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_trial(process: subprocess.Popen, number: int | str = "") -> None:
    """Until the line of trial `number` (or of any) is printed."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"trial {number}"):
            return
    pytest.fail(f"the sweep ended before trial {number}")


@pytest.fixture
def migrated(tmp_path: Path, empty_store: Path) -> None:
    """Spare the seconds that making an MLflow store takes, where that is not what is tested."""
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns" / "mlflow.db")


@pytest.fixture
def kdexp(tmp_path: Path) -> Kdexp:
    """Run kdexp in a folder of its own: kdexp("sweep", "tiny.yaml") → the finished process."""

    def run(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny sweep as a file (JSON is YAML)."""
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(json.loads(tiny_sweep().model_dump_json()), indent=1))
    return path


@pytest.fixture
def kdexp_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kdexp:
    """The same main() in this process, where a process per call would only cost the seconds of its
    imports.
    """
    from kdexp.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDEXP_THREADS", "1")
    monkeypatch.setenv("KDEXP_WORKERS", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["kdexp", *arguments])
        before, code = signal.getsignal(signal.SIGTERM), 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run


def runs(folder: Path, kind: str) -> Counter:
    """How many runs of a kind the embedded store holds, by status."""
    query = (
        "select status from runs join tags using (run_uuid) where tags.key = 'kdexp.kind' and"
        " tags.value = ?"
    )
    with sqlite3.connect(folder / "mlruns" / "mlflow.db", timeout=60) as database:
        return Counter(status for (status,) in database.execute(query, (kind,)))


def trials(folder: Path) -> Counter:
    """How many finished MLflow runs each trial number has."""
    query = (
        "select value from tags join runs using (run_uuid) where tags.key = 'kdexp.trial' and"
        " status = 'FINISHED' and run_uuid in (select run_uuid from tags where key = 'kdexp.kind'"
        " and value = 'trial')"
    )
    with sqlite3.connect(folder / "mlruns" / "mlflow.db", timeout=60) as database:
        return Counter(int(number) for (number,) in database.execute(query))
