"""kdexp killed at will: each life is a process of its own, forked from one that has imported
everything once.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import migrated_store, tiny_sweep, until

Fault = Callable[[], None]
REPEATING = {
    "student__channels": [6, 12],
    "training__epochs": 2,
    "training__learning_rate": 0.02,
    "search__student.channels": {"choices": [[2, 4], [3, 6], [4, 6], [4, 8], [6, 8], [6, 12]]},
    "study__objective": "smallest",
    "study__trials": 12,
    "study__repeats": 5,
    "study__retries": 100,
    "selection__accuracy_bar": 0.25,
}
"""A study that aims at the smallest: what passes is trained again, on other folds."""
SWEEP = ("sweep", "tiny.yaml", "--workers", "1", "--threads", "1")
PRELOAD = (
    "kdexp.workers.preload",
    "kdexp.cli",
    "kdexp.search.sweep",
    "kdexp.select.promote",
    "mlflow.pytorch",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "optuna.storages",
    "optuna.samplers._gp.sampler",
    "sklearn.datasets",
    "torch.export",
    "torch._inductor.config",
)
"""What a life imports, once for all of them."""


@dataclass(frozen=True)
class End:
    """How a life ended: exit code (negative: the signal), what it printed."""

    code: int | None
    out: str
    err: str


class Life:
    """One kdexp command under way."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], fault: Fault | None = None, name: str = ""
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self.folder, self.name = folder, name
        self.process = context.Process(target=_live, args=(folder, tuple(arguments), fault, name))
        self.process.start()

    def trains(self, timeout: float = 120) -> None:
        """Wait until a first epoch is over, which its checkpoint shows."""

        def begun() -> bool:
            assert self.process.is_alive(), "it has ended before its first checkpoint"
            return any((self.folder / "mlruns" / "checkpoints").glob("*/*"))

        until(begun, "a first checkpoint", timeout)

    def end(self, timeout: float = 300) -> End:
        """Wait for it."""
        self.process.join(timeout)
        assert not self.process.is_alive(), "it hangs"
        texts = [
            (self.folder / name).read_text()
            for name in (f"{self.name}out.txt", f"{self.name}err.txt")
        ]
        return End(self.process.exitcode, *texts)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()


def _live(folder: Path, arguments: Sequence[str], fault: Fault | None, prefix: str) -> None:
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, stream in (("out.txt", 1), ("err.txt", 2)):
        os.dup2(os.open(prefix + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for name in [name for name in os.environ if name.startswith(("KDEXP_", "MLFLOW_TRACKING"))]:
        del os.environ[name]
    os.environ["COLUMNS"] = "200"
    import kdexp.workers.work
    from kdexp.cli import main

    kdexp.workers.work.CHECKPOINT_SECONDS = 0.0  # the epochs here are that short
    if fault:
        fault()
    sys.argv = ["kdexp", *arguments]
    main()


@dataclass(frozen=True)
class Dies:
    """Kill this process at the n-th call of a function, before it or after it."""

    where: str
    """module:name or module:Class.name"""
    call: int = 1
    after: bool = False
    only: str = ""
    """Only calls among whose arguments this text occurs are counted."""

    def __call__(self) -> None:
        module, _, name = self.where.partition(":")
        holder: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        original, calls = getattr(holder, last), [0]

        def dying(*args: Any, **kwargs: Any) -> Any:
            counts = self.only in repr((args, kwargs))
            calls[0] += counts
            fatal = counts and calls[0] == self.call
            if fatal and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(holder, last, dying)


@dataclass(frozen=True)
class Sets:
    """Other values for a module's constants, and what else is to be done at the start."""

    values: Mapping[str, Any]
    """By module:NAME."""
    then: Fault | None = None

    def __call__(self) -> None:
        for where, value in self.values.items():
            module, _, name = where.partition(":")
            setattr(importlib.import_module(module), name, value)
        if self.then:
            self.then()


@dataclass(frozen=True)
class Facts:
    """What a finished study holds: all that an interrupted one must have in common with an unbroken
    one.
    """

    trials: Mapping[int, Any]
    """Optuna's state, value and parameters of each trial."""
    metrics: Mapping[int, Any]
    """Every (name, epoch, value) of each trial's finished run, as often as it is stored."""
    weights: Mapping[int, str]


def facts(folder: Path, mlflow_db: Path | None = None) -> Facts:
    """Read the embedded stores, or MLflow's of a server."""
    with sqlite3.connect(folder / "mlruns" / "optuna.db", timeout=60) as optuna:
        states = optuna.execute(
            "select t.number, t.state, v.value from trials t left join trial_values v using"
            " (trial_id)"
        ).fetchall()
        values = optuna.execute(
            "select number, param_name, param_value from trials join trial_params using (trial_id)"
        ).fetchall()
    with sqlite3.connect(mlflow_db or folder / "mlruns" / "mlflow.db", timeout=60) as mlflow:
        tags = mlflow.execute("select run_uuid, key, value from tags").fetchall()
        finished = {
            run for (run,) in mlflow.execute("select run_uuid from runs where status = 'FINISHED'")
        }
        points = mlflow.execute(
            "select run_uuid, key, step, value, is_nan from metrics where key like 'epoch/%'"
        ).fetchall()
    kinds = {run for run, key, value in tags if (key, value) == ("kdexp.kind", "trial")}
    number = {
        run: int(value)
        for run, key, value in tags
        if key == "kdexp.trial" and run in kinds & finished
    }
    assert len(set(number.values())) == len(number), "a trial has two finished runs"
    measured: dict[int, list[Any]] = {each: [] for each in number.values()}
    for run, key, step, value, nan in points:
        if run in number and key != "epoch/seconds":
            measured[number[run]].append((key, step, repr(value), nan))
    for run, key, step, *_ in points:
        if run in number and key == "epoch/seconds":
            measured[number[run]].append((key, step))
    return Facts(
        trials={
            n: (state, repr(value), sorted((k, repr(v)) for m, k, v in values if m == n))
            for n, state, value in states
        },
        metrics={each: sorted(rows, key=repr) for each, rows in measured.items()},
        weights={
            number[run]: value
            for run, key, value in tags
            if key == "kdexp.weights_sha256" and run in number
        },
    )


def told(storage: str) -> list[tuple[Any, ...]]:
    """All that the sampler knows of each trial of the one study there, and what it repeats."""
    (name,) = optuna.get_all_study_names(storage)
    return [
        (
            trial.params,
            dict(trial.constraints),
            trial.values,
            [trial.user_attrs.get(key) for key in ("repeats", "repeat", "measured")],
        )
        for trial in optuna.load_study(study_name=name, storage=storage).trials
    ]


def embedded(folder: Path) -> str:
    """Optuna's storage of a study in a folder."""
    return f"sqlite:///{folder / 'mlruns' / 'optuna.db'}"


def statuses(folder: Path, mlflow_db: Path | None = None) -> Counter[tuple[str, str]]:
    """How many runs there are by (kind, status)."""
    query = "select value, status from runs join tags using (run_uuid) where key = 'kdexp.kind'"
    with sqlite3.connect(mlflow_db or folder / "mlruns" / "mlflow.db", timeout=60) as mlflow:
        return Counter(mlflow.execute(query).fetchall())


def no_run_is_left_open(folder: Path) -> bool:
    """Nothing is RUNNING, in MLflow or in Optuna, and no checkpoint is left."""
    with sqlite3.connect(folder / "mlruns" / "optuna.db", timeout=60) as optuna:
        open_trials = optuna.execute(
            "select count(*) from trials where state = 'RUNNING'"
        ).fetchone()[0]
    left = list((folder / "mlruns" / "checkpoints").glob("*/*"))
    return (
        not open_trials
        and not left
        and not any(status == "RUNNING" for _, status in statuses(folder))
    )


def written(folder: Path, **changes: Any) -> Path:
    """The tiny sweep as a file in a folder that has a store, with changes by dotted path."""
    tree = json.loads(tiny_sweep().model_dump_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = tree
        for parent in parents:
            at = at[parent]
        at[last] = value
    (folder / "mlruns").mkdir(parents=True)
    shutil.copy(migrated_store(), folder / "mlruns" / "mlflow.db")
    (folder / "tiny.yaml").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the tiny sweep: four trials of four epochs."""
    return written(tmp_path / "place", training__epochs=4, study__retries=100)


def unbroken(folder: Path, arguments: Sequence[str] = SWEEP, **changes: Any) -> Facts:
    """What the same sweep comes to where nothing happens to it."""
    end = Life(written(folder, **changes), arguments).end()
    assert end.code == 0, end.err
    return facts(folder)


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, list[tuple[Any, ...]]]:
    """The study with repeats, unbroken, and what its sampler was told."""
    folder = tmp_path_factory.mktemp("repeating") / "place"
    return unbroken(folder, **REPEATING), told(embedded(folder))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """The study in `place`, unbroken."""
    return unbroken(
        tmp_path_factory.mktemp("whole") / "place", training__epochs=4, study__retries=100
    )
