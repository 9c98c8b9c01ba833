"""Servers that are killed, restarted, overloaded, or gone: what was measured arrives, each value once."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.conftest import SWEEP, Dies, Facts, Life, Sets, facts, statuses, written
from faults.servers import BadProxy, MlflowServer, Postgresql

pytestmark = [pytest.mark.slow, pytest.mark.postgresql]

LONG = {"training__epochs": 40, "study__trials": 6, "study__sampler": "random", "study__retries": 100}
OFTEN = {"kdexp.runner:DELIVER_SECONDS": 0.3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests here, each of which starts it if it has to."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """The long study on embedded stores, unbroken."""
    folder = written(tmp_path_factory.mktemp("long") / "place", **LONG)
    end = Life(folder, SWEEP).end()
    assert end.code == 0, end.err
    return facts(folder)


def renamed(folder: Path, name: str, **changes: object) -> Path:
    return written(folder, **{**LONG, "name": name, **changes})


def of_study(server: MlflowServer, folder: Path, name: str) -> Facts:
    """Only this study's runs: the server holds several."""
    import sqlite3

    copy = folder / "server-copy.db"
    with sqlite3.connect(server.database, timeout=60) as source, sqlite3.connect(copy) as target:
        source.backup(target)
        own = "(select run_uuid from tags where key = 'kdexp.study' and value = ?)"
        for table in ("metrics", "tags", "runs"):
            if table != "tags":
                target.execute(f"delete from {table} where run_uuid not in {own}", (name,))
        target.execute("delete from tags where run_uuid not in (select run_uuid from runs)")
    found = facts(folder, copy)
    assert not any(status == "RUNNING" for _, status in statuses(folder, copy))
    return found


def test_a_server_killed_and_restarted_three_times(tmp_path: Path, server: MlflowServer, long: Facts) -> None:
    place, dice = renamed(tmp_path / "place", "thrice"), random.Random(3)
    life = Life(place, [*SWEEP, "--tracking-uri", server.url], Sets(OFTEN))
    life.trains()
    for _ in range(3):
        server.kill()
        time.sleep(dice.uniform(1, 4))
        server.start()
        time.sleep(dice.uniform(1, 4))
    end = life.end()
    assert end.code == 0, end.err
    assert of_study(server, place, "thrice") == long


def test_a_server_that_is_gone_for_good_costs_nothing_that_was_measured(
    tmp_path: Path, server: MlflowServer, long: Facts
) -> None:
    place = renamed(tmp_path / "place", "gone")
    command = [*SWEEP, "--tracking-uri", server.url]
    life = Life(place, command, Sets({**OFTEN, "kdexp.tracking:PATIENCE": 3.0}))
    life.trains()
    server.kill()
    end = life.end()
    assert end.code == 1
    last = end.err.strip().splitlines()[-1]
    assert last.startswith("kdexp: No answer from MLflow"), end.err
    assert "Nothing measured is lost. Continue with the same command: kdexp sweep tiny.yaml" in last
    assert "Traceback" not in end.err
    server.start()
    end = Life(place, command).end()
    assert end.code == 0, end.err
    assert of_study(server, place, "gone") == long


@pytest.mark.parametrize("how", ["500", "429", "slow", "answer lost"])
def test_a_server_that_answers_badly(tmp_path: Path, server: MlflowServer, how: str) -> None:
    changes = {"training__epochs": 4, "study__trials": 4, "study__sampler": "tpe"}
    place, proxy = renamed(tmp_path / "place", f"bad {how}", **changes), BadProxy(server.url, how)
    expected = written(tmp_path / "expected", **{**LONG, **changes})
    try:
        end = Life(place, [*SWEEP, "--tracking-uri", proxy.url], Sets(OFTEN)).end()
    finally:
        proxy.stop()
    assert end.code == 0, end.err
    assert proxy.count > 20
    assert Life(expected, SWEEP).end().code == 0
    assert of_study(server, place, f"bad {how}") == facts(expected)


@pytest.fixture
def postgresql() -> Iterator[Postgresql]:
    server = Postgresql()
    server.start()
    yield server
    server.remove()


@pytest.mark.parametrize("ends_early", [{"study__pruner": "median"}, {"study__early_stop": True}])
def test_a_database_that_is_restarted_is_waited_for(tmp_path: Path, postgresql: Postgresql, ends_early: dict) -> None:
    place = written(tmp_path / "place", **LONG, **ends_early)
    life = Life(place, [*SWEEP, "--storage", postgresql.url])
    life.trains()
    for _ in range(3):
        postgresql.kill()
        time.sleep(2)
        postgresql.start()
        time.sleep(2)
    end = life.end()
    assert end.code == 0, end.err
    assert "Selected: trial" in end.out
    assert statuses(place)["trial", "FINISHED"] == 6
    assert sum(statuses(place).values()) == 8


def test_a_worker_of_another_machine_that_is_gone_is_noticed_by_its_silence(tmp_path: Path, postgresql: Postgresql) -> None:
    """The second machine takes over the trial, within the lease, and neither lets a run stay open that it can reach."""
    changes = {"training__epochs": 6, "study__trials": 3}
    leases = Sets({"kdexp.study:BEAT_SECONDS": 0.5, "kdexp.study:LEASE_SECONDS": 3.0})
    stores = tmp_path / "mlflow.db"
    command = [*SWEEP, "--storage", postgresql.url, "--tracking-uri", f"sqlite:///{stores}"]
    one, two = written(tmp_path / "one", **changes), written(tmp_path / "two", **changes)
    dies = Dies("kdexp.runner:Running.record", call=8)
    assert Life(one, command, Sets(leases.values, dies)).end().code == -signal.SIGKILL
    started = time.monotonic()
    end = Life(two, command, leases).end()
    assert end.code == 0, end.err
    assert "Selected: trial" in end.out
    assert time.monotonic() - started > 3.0
    found = statuses(two, stores)
    assert found["trial", "FINISHED"] == 3
    assert found["trial", "RUNNING"] == found["study", "RUNNING"] == 0
