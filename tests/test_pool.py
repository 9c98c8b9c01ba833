"""How many workers, with how many threads each."""

from __future__ import annotations

import pickle

import pytest
import torch

from kdexp import KdexpError, limits
from kdexp.search.scheduler import WorkerLost
from kdexp.settings import Settings, in_one_line
from kdexp.workers import pool
from kdexp.workers.pool import WORKER_BYTES, PoolSize, pool_size

CPU = torch.device("cpu")
CASES = {  # cores, memory in workers, workers, threads, trials: chosen
    "one for each core": (4, 99, None, None, 50, PoolSize(4, 1)),
    "no more than trials": (4, 99, None, None, 3, PoolSize(3, 1)),
    "as memory allows": (8, 2, None, None, 50, PoolSize(2, 4)),
    "at least one": (1, 0, None, None, 50, PoolSize(1, 1)),
    "threads given": (8, 99, None, 4, 50, PoolSize(2, 4)),
    "more threads than cores": (2, 99, None, 4, 50, PoolSize(1, 4)),
    "workers given": (8, 99, 2, None, 50, PoolSize(2, 4)),
    "one worker has all cores": (8, 99, 1, None, 50, PoolSize(1, 8)),
    "more workers than cores": (2, 0, 4, None, 50, PoolSize(4, 1)),
    "both given": (2, 99, 3, 2, 50, PoolSize(3, 2)),
    "nothing to do": (4, 99, None, None, 0, PoolSize(1, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_cores_memory_and_trials_decide_how_many_workers(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cores, memory, workers, threads, trials, chosen = CASES[name]
    monkeypatch.setattr(limits, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads or cores)
    monkeypatch.setattr(limits, "free_memory", lambda: memory * WORKER_BYTES)
    assert pool_size(Settings(workers=workers, threads=threads), CPU, trials) == chosen


def test_a_gpu_has_one_worker_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool_size(Settings(workers=None, threads=1), torch.device("cuda"), 50) == PoolSize(1, 1)
    assert pool_size(Settings(workers=3, threads=1), torch.device("cuda"), 50) == PoolSize(3, 1)


def test_what_a_worker_ended_of_is_one_line() -> None:
    assert pool._died_of(-9) == "killed by SIGKILL (the system does that where memory is short)"
    assert pool._died_of(3) == "exit code 3"
    assert str(WorkerLost(2, (7,), "x")) == "worker 2 ended in trial 7: x"
    assert str(WorkerLost(2, (7, 9), "x")) == "worker 2 ended in trial 7, 9: x"
    assert str(WorkerLost(2, (), "x")) == "worker 2 ended: x"
    assert (
        in_one_line(OSError(28, "No space left on device", "a/b")) == "a/b: No space left on device"
    )
    assert (
        in_one_line(KdexpError("postgresql://me:secret@host is away"))
        == "postgresql://***@host is away"
    )
    assert in_one_line(ValueError("one\ntwo")).startswith("Unexpected ValueError: one (--debug")


def test_settings_travel_as_they_are() -> None:
    settings = Settings(workers=None, threads=2)
    assert pickle.loads(pickle.dumps(settings)) == settings
