"""The worker processes of one command: each trains trials of the same study, this process watches.

A worker is cheap: it is forked from a server that has imported everything once, gets data and teacher from this
process, and maps the teacher's logits from the one file. One that dies leaves its trial to the others. Workers
ignore Ctrl-C: this process stops them, and where it is gone they stop by themselves.
"""

from __future__ import annotations

import _thread
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

from kdexp import KdexpError
from kdexp.claims import Claimant
from kdexp.config import Sweep
from kdexp.environment import configure
from kdexp.runner import Prepared
from kdexp.settings import Settings, in_one_line
from kdexp.study import OpenStudy, check_study, open_study
from kdexp.surroundings import open_streams
from kdexp.tracking import Tracking
from kdexp.trials import TrialEvent, TrialFailed, TrialFinished, TrialStarted, leave, run_trials
from kdexp.workers import start_method

__all__ = ["Crew", "CrewError", "WorkerLost", "crew_of", "run_crew"]

WORKER_BYTES = 5 * 2**28  # its peak, with compiled students on Fashion-MNIST: 1.1 to 1.2 GiB resident, some of it shared


class CrewError(KdexpError):
    """Every worker is gone, and trials are left."""


@dataclass(frozen=True)
class Crew:
    """How many processes train side by side, with how many CPU threads each."""

    workers: int
    threads: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker ended before its time, and of what; `trials` are those it was training."""

    worker: int
    trials: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        where = f" in trial {', '.join(map(str, self.trials))}" if self.trials else ""
        return f"worker {self.worker} ended{where}: {self.why}"


def crew_of(settings: Settings, device: torch.device, trials: int) -> Crew:
    """The crew for so many trials: as many workers as asked for, else one for each core (or on a GPU one).

    Torch's own threads (or what the settings say for each) are shared out among them.
    """
    workers = settings.workers or _as_many_as_fit(device, settings.threads or 1)
    workers = max(min(workers, trials), 1)
    return Crew(workers, settings.threads or max(torch.get_num_threads() // workers, 1))


def run_crew(
    crew: Crew, study: OpenStudy, prepared: Prepared, settings: Settings, device: torch.device, experiment_id: str
) -> Generator[TrialEvent | WorkerLost, None, None]:
    """Train a study's trials by a crew; yields its events as they come. Close the generator to stop cleanly.

    A worker without a trial waits until all are: one that dies late still finds somebody to take over.
    Raises CrewError where workers died and trials are left.
    """
    orders = pickle.dumps(_Orders(study.sweep, settings, str(device), crew.threads, experiment_id, prepared))
    members: list[_Member] = []
    lost: list[WorkerLost] = []
    try:
        for number in range(1, crew.workers + 1):
            members.append(_hire(number))
        for member in members:
            with suppress(OSError):  # it has died: its connection will say so
                member.connection.send_bytes(orders)
        del orders
        while living := [member for member in members if not member.ended]:
            if all(member.idle for member in living):
                _tell(living, go_on=False)
            for connection in wait([member.connection for member in living]):
                member = next(member for member in living if member.connection is connection)
                event = member.receive()
                if isinstance(event, WorkerLost):
                    lost.append(event)
                    _tell([other for other in living if other.idle and not other.ended], go_on=True)
                if event is not None:
                    yield event
    finally:
        _stop(members)
    left = study.left
    if lost and left:
        error = CrewError(f"{left} trials of study '{study.sweep.name}' are not finished: {'; '.join(map(str, lost))}.")
        for trace in (member.failure.trace for member in members if member.failure):
            error.add_note(trace)
        raise error


# --- this process's side ---


class _Member:
    """A worker as this process sees it."""

    def __init__(self, number: int, process: BaseProcess, connection: Connection) -> None:
        self.number, self.process, self.connection = number, process, connection
        self.idle = self.dismissed = self.ended = False
        self.trials: set[int] = set()
        self.failure: _Failure | None = None

    def receive(self) -> TrialEvent | WorkerLost | None:
        """What the worker has to say to others: an event, its own loss, or nothing."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):  # closed, or torn in the middle of a message
            return self._end()
        match message:
            case _Idle():
                self.idle = True
                return None
            case _Failure():
                self.failure = message
                return None
            case TrialStarted(number=number):
                self.trials.add(number)
            case TrialFinished(number=number) | TrialFailed(number=number):
                self.trials.discard(number)
        return message

    def _end(self) -> WorkerLost | None:
        self.ended = True
        self.connection.close()
        self.process.join()
        code = self.process.exitcode
        if self.dismissed and code == 0:
            return None
        why = self.failure.message if self.failure else _died_of(code)
        return WorkerLost(self.number, tuple(sorted(self.trials)), why)


def _as_many_as_fit(device: torch.device, threads: int) -> int:
    if device.type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // threads, _free_memory() // WORKER_BYTES)


def _free_memory() -> int:
    """Bytes that processes may still take; without an answer, more than they ever will."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**63


def _hire(number: int) -> _Member:
    context: Any = multiprocessing.get_context(start_method())
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), name=f"kdexp worker {number}", daemon=True)
    process.start()
    there.close()  # the worker's end is its own: when it dies, this one says so
    return _Member(number, process, here)


def _tell(members: list[_Member], go_on: bool) -> None:
    """Let idle workers look for trials again, or go home."""
    for member in members:
        member.idle, member.dismissed = False, not go_on
        with suppress(OSError):  # it has died: its connection will say so
            member.connection.send(go_on)


def _stop(members: list[_Member]) -> None:
    """Stop whoever still works, cleanly; a second Ctrl-C stops them at once."""
    living = [member.process for member in members if not member.ended]
    try:
        for process in living:
            process.terminate()
        for process in living:
            process.join()
    except KeyboardInterrupt:
        for process in living:
            process.kill()
        raise


def _died_of(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (the system does that where memory is short)" if name == "SIGKILL" else "")
    return "stopped" if code == INTERRUPTED else f"exit code {code}"


# --- the worker's side ---

INTERRUPTED = 130


@dataclass(frozen=True)
class _Orders:
    """Everything a worker is given."""

    sweep: Sweep
    settings: Settings
    device: str
    threads: int
    experiment_id: str
    prepared: Prepared


@dataclass(frozen=True)
class _Idle:
    """No trial is left to begin; others may still have theirs under way."""


@dataclass(frozen=True)
class _Failure:
    """What a worker failed of, in one line and in full."""

    message: str
    trace: str


def _work(connection: Connection) -> None:
    """A worker's whole life, from its orders on."""
    try:
        open_streams()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "SIGHUP"):  # our parent stops us, once it has heard of it
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _interrupt_once)
        threading.Thread(target=_stop_without_parent, daemon=True).start()
        _train(connection, pickle.loads(connection.recv_bytes()))  # noqa: S301 - our parent's own
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        with suppress(OSError):
            connection.send(_Failure(in_one_line(error), traceback.format_exc()))
        sys.exit(1)


def _train(connection: Connection, orders: _Orders) -> None:
    configure(orders.device, orders.threads)
    tracking, sweep, settings = Tracking(orders.settings), orders.sweep, orders.settings
    check_study(sweep, settings)
    study = open_study(sweep, settings, _deleted)
    pack, checkpoints = settings.pack or 1, study.checkpoints(settings)
    with Claimant(settings) as claimant:
        try:
            while True:
                trials = run_trials(study, orders.prepared, tracking, orders.experiment_id, claimant, checkpoints, pack)
                with closing(trials) as events:
                    for event in events:
                        connection.send(event)
                connection.send(_Idle())
                if not connection.recv():
                    return
        finally:
            if not _parent_lives():
                leave(study, tracking, claimant, finished=False)


def _interrupt_once(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being closed is not to be interrupted again
    raise KeyboardInterrupt


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _thread.interrupt_main(signal.SIGTERM)


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()


def _deleted(mark: str) -> NoReturn:
    raise KdexpError("the study was deleted from Optuna's storage while it was under way")
