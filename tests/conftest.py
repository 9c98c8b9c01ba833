"""Shared parts of the tests: shapes checked at run time, real stores in temporary folders, small
real data.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# shapes in annotations are checked in every test
hook = install_import_hook("kdexp.distill", "beartype.beartype")

import torch

from kdexp import urls
from kdexp.config import Sweep
from kdexp.distill.datasets import DEBIAN, Splits, load_splits
from kdexp.runs.tracking import Tracking
from kdexp.settings import Settings

torch.set_num_threads(1)  # the networks here are too small to share
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run under CI, or when they are asked for."""
    if os.environ.get("CI") != "true" and "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(
                    pytest.mark.skip(reason="slow: runs under CI=true, or with -m slow")
                )


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests() -> Iterator[None]:
    """What one test masks, the next may print."""
    yield
    urls._secrets.clear()


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def needs(present: bool, what: str) -> None:
    """Skip with a reason where something is absent; under CI its absence is a failure."""
    if not present:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have {what}")
        pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def fashion() -> Path:
    """The folder of the real Fashion-MNIST files, from where kdexp itself looks for them."""
    places = [ROOT / "data" / "FashionMNIST" / "raw", DEBIAN]
    found = next((place for place in places if list(place.glob("train-images-idx3-ubyte*"))), None)
    needs(found is not None, "the Fashion-MNIST files (Debian package dataset-fashion-mnist)")
    assert found is not None
    return found


@pytest.fixture
def tiny() -> Sweep:
    """A sweep over real digits that takes seconds."""
    return tiny_sweep()


def tiny_sweep() -> Sweep:
    """The same, for fixtures that outlive a test."""
    return Sweep.model_validate_json("""{"name": "tiny",
        "data": {"dataset": "digits", "channels": 1, "validation_fraction": 0.2, "augment": {"flip": false, "shift": 1}},
        "teacher": {"architecture": "cnn", "channels": [8, 16], "hidden": 16, "epochs": 3, "learning_rate": 0.01},
        "student": {"channels": [4, 8], "hidden": 16},
        "training": {"epochs": 3, "learning_rate": 0.01},
        "search": {"distillation.alpha": {"low": 0.0, "high": 1.0},
                   "distillation.temperature": {"low": 1.0, "high": 10.0, "log": true},
                   "training.learning_rate": {"low": 0.003, "high": 0.03, "log": true},
                   "student.channels": {"choices": [[2, 4], [4, 8]]}},
        "study": {"trials": 4, "objective": "accuracy"},
        "selection": {"accuracy_bar": 0.2}}""")


@pytest.fixture(scope="session")
def digits() -> Splits:
    """Digits as the tiny sweep splits them."""
    from kdexp.config import Augment, Data

    return load_splits(
        Data(
            dataset="digits",
            channels=1,
            validation_fraction=0.2,
            augment=Augment(flip=False, shift=1),
        )
    )


def drain(generator: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """Every event of a generator, and what it returns."""
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


@cache
def migrated_store() -> Path:
    """A migrated MLflow store: making one takes seconds, copying it none."""
    folder = Path(tempfile.mkdtemp(prefix="empty-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Tracking(Settings(stores=folder))
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def empty_store() -> Path:
    """The same, as a fixture."""
    return migrated_store()


@pytest.fixture
def settings(tmp_path: Path, empty_store: Path) -> Settings:
    """Fresh embedded stores."""
    (tmp_path / "mlruns").mkdir()
    return stores_in(tmp_path / "mlruns", empty_store)


def stores_in(folder: Path, empty_store: Path) -> Settings:
    """The same in a folder, for fixtures that outlive a test."""
    shutil.copy(empty_store, folder / "mlflow.db")
    return Settings(stores=folder)


@pytest.fixture
def tracking(settings: Settings) -> Tracking:
    """MLflow on the fresh stores."""
    return Tracking(settings)
