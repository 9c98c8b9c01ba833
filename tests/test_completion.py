"""What a shell completes, and that it never says anything else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdexp.config import Sweep, flatten
from kdexp.runs.tracking import Tracking
from kdexp.settings import Settings


def completed(words: str, folder: Path) -> list[str]:
    """What bash is offered after these words; nothing may be said on stderr."""
    number = len(words.split()) - (not words.endswith(" "))
    asked = {"_KDEXP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = subprocess.run(
        [sys.executable, "-m", "kdexp"],
        env=os.environ | asked,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.fixture
def recorded(tracking: Tracking, settings: Settings) -> dict[str, str]:
    """Two studies, one of them deleted, and a trial, in the embedded store."""
    experiment = tracking.experiment("mine")
    made = {
        name: tracking.start(experiment, "study", f"study {name}", {}, {"kdexp.study": name})
        for name in ("größe-2", "gone")
    }
    made["trial"] = tracking.start(
        experiment, "trial", "trial 0", {}, {"kdexp.study": "größe-2"}, made["größe-2"]
    )
    tracking.client.delete_run(made["gone"])
    return made


def test_studies_and_runs_of_the_store_here(recorded: dict[str, str], settings: Settings) -> None:
    folder = settings.stores.parent
    assert completed("kdexp select ", folder) == ["größe-2"]
    assert completed("kdexp confirm x", folder) == []
    for name in ("reproduce", "export", "predict", "benchmark"):
        assert completed(f"kdexp {name} {recorded['trial'][:4]}", folder) == [recorded["trial"]]


def test_a_store_elsewhere(recorded: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    words = f"kdexp select --stores {settings.stores} "
    assert completed(words, tmp_path / "other") == ["größe-2"]


def test_every_key_of_a_sweep_file_but_those_of_the_search(tmp_path: Path) -> None:
    keys = completed("kdexp sweep x.yaml --set ", tmp_path)
    sections = {path for path in flatten(Sweep(name="x")) if path not in ("search",)}
    assert {key.removesuffix("=") for key in keys} == sections
    assert completed("kdexp check x.yaml --set training.ep", tmp_path) == ["training.epochs="]


def test_without_a_store_or_with_a_broken_one_nothing_is_said_or_made(tmp_path: Path) -> None:
    assert completed("kdexp select ", tmp_path) == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(b"no database" * 100)
    assert completed("kdexp select ", tmp_path) == []
    assert completed("kdexp reproduce ", tmp_path) == []


def test_it_answers_within_half_a_second(recorded: dict[str, str], settings: Settings) -> None:
    def once() -> float:
        started = time.perf_counter()
        completed("kdexp reproduce ", settings.stores.parent)
        return time.perf_counter() - started

    # the best of ten: a busy machine is not what is tested
    assert any(once() < 0.5 for _ in range(10))
