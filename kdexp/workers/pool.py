"""The workers of one command: threads or processes that wait for jobs, and one inbox for what they
say.

A worker of this process is a thread; several are processes, so that one may die without the others.
Each process is forked from a server that has imported the distillation core once. It maps the
teacher's logits from the one file. Workers ignore Ctrl-C: the command stops them. A process whose
command is gone stops by itself.

What a worker says never waits to be read: a thread here empties each worker's pipe into the inbox.
"""

from __future__ import annotations

import _thread
import multiprocessing
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from kdexp import limits
from kdexp.environment import configure
from kdexp.settings import Settings, in_one_line
from kdexp.surroundings import open_streams
from kdexp.workers.processes import start_method, without_main
from kdexp.workers.work import Job, Message, Prepared, Verdict, work

__all__ = ["Died", "Pool", "PoolSize", "Worker", "pool_size"]

WORKER_BYTES = 5 * 2**28
"""A process at its peak, with compiled students on Fashion-MNIST: 1.1 to 1.2 GiB, some of it
shared.
"""
INTERRUPTED = 130
WAKE_SECONDS = 0.2
STOP_SECONDS = 60.0
"""For so long a worker that is stopped may finish what it is at."""


@dataclass(frozen=True)
class PoolSize:
    """How many workers train side by side, with how many CPU threads each."""

    workers: int
    threads: int


@dataclass(frozen=True)
class Died:
    """A worker ended before its time, and of what."""

    why: str
    trace: str = ""


class Worker:
    """A worker as its command sees it."""

    def __init__(self, number: int, inbox: Inbox) -> None:
        self.number, self.alive, self.retired = number, True, False
        self.job: Job | None = None
        self._inbox = inbox

    def give(self, job: Job) -> None:
        """A job; the former one is done."""
        self.job = job
        self._send(job)

    def answer(self, verdict: Verdict) -> None:
        """What is decided after an epoch."""
        self._send(verdict)

    def retire(self) -> None:
        """Give it no more to do."""
        self.alive, self.retired = False, True
        self.stop()

    def stop(self) -> None:
        """Break off what it does."""
        raise NotImplementedError

    def join(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        raise NotImplementedError

    def kill(self) -> None:
        """Do not wait any longer."""

    def _send(self, message: Job | Verdict) -> None:
        raise NotImplementedError


Inbox = queue.SimpleQueue[tuple[Worker, Message | Died]]


class Pool:
    """So many workers on the same data and teacher; a context manager that stops them on the way
    out.
    """

    def __init__(self, size: PoolSize, prepared: Prepared, device: str) -> None:
        self.size = size
        self.workers: list[Worker] = []
        self._inbox: Inbox = queue.SimpleQueue()
        if size.workers == 1:
            self.workers.append(_Thread(1, self._inbox, prepared))
            return
        orders = pickle.dumps(_Orders(prepared, device, size.threads))
        try:
            for number in range(1, size.workers + 1):
                self.workers.append(_Process(number, self._inbox, orders))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def living(self) -> list[Worker]:
        """Workers that have not died."""
        return [worker for worker in self.workers if worker.alive]

    def receive(self) -> tuple[Worker, Message | Died]:
        """What some worker says next; waits for it. A worker that has died is not alive any
        more.
        """
        while True:
            # in pieces: a lock that is waited for is deaf to signals on some systems
            with suppress(queue.Empty):
                worker, message = self._inbox.get(timeout=WAKE_SECONDS)
                break
        if isinstance(message, Died):
            worker.alive = False
        return worker, message

    def _stop(self) -> None:
        """Stop whoever still works; a second Ctrl-C does not wait for them."""
        living = self.living
        try:
            for worker in living:
                worker.stop()
            deadline = time.monotonic() + STOP_SECONDS
            for worker in living:
                while not worker.join(WAKE_SECONDS):
                    if time.monotonic() > deadline:
                        worker.kill()
        except KeyboardInterrupt:
            for worker in living:
                worker.kill()
            raise


def pool_size(settings: Settings, device: torch.device, trials: int) -> PoolSize:
    """The pool for so many trials: as many workers as asked for, else one for each core (or on a
    GPU one).

    Torch's own threads (or what the settings say for each) are shared out among them.
    """
    workers = settings.workers or _as_many_as_fit(device, settings.threads or 1)
    workers = max(min(workers, trials), 1)
    return PoolSize(workers, settings.threads or max(torch.get_num_threads() // workers, 1))


def _as_many_as_fit(device: torch.device, threads: int) -> int:
    if device.type != "cpu":
        return 1
    return min(limits.cores() // threads, limits.free_memory() // WORKER_BYTES)


# --- a thread of this process ---


class _Stopped(BaseException):
    """A thread is to end."""


class _Thread(Worker):
    def __init__(self, number: int, inbox: Inbox, prepared: Prepared) -> None:
        super().__init__(number, inbox)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        name = f"kdexp worker {number}"
        self._thread = threading.Thread(target=self._work, args=(prepared,), name=name, daemon=True)
        self._thread.start()

    def _send(self, message: Job | Verdict) -> None:
        if isinstance(message, Job):
            self._jobs.put(message)
        else:
            self._verdicts.put(message)

    def stop(self) -> None:
        self._stopped.set()
        self._jobs.put(None)
        self._verdicts.put(None)

    def join(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self, prepared: Prepared) -> None:
        try:
            while job := self._jobs.get():
                work(job, prepared, self._say, self._hear, self._pulse)
        except _Stopped:
            return
        except BaseException as error:  # such as a sys.exit() in a user's own network
            why = f"{type(error).__name__}: {error}"
            self._inbox.put((self, Died(why, traceback.format_exc())))

    def _say(self, message: Message) -> None:
        self._inbox.put((self, message))

    def _hear(self, seconds: float) -> Verdict | None:
        try:
            verdict = (
                self._verdicts.get(timeout=seconds) if seconds else self._verdicts.get_nowait()
            )
        except queue.Empty:
            return None
        self._pulse()
        return verdict

    def _pulse(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


# --- a process, as the command sees it ---


@dataclass(frozen=True)
class _Orders:
    """Everything that a process is given at its start."""

    prepared: Prepared
    device: str
    threads: int


@dataclass(frozen=True)
class _Failure:
    """What a process failed of outside of any job."""

    why: str
    trace: str


class _Process(Worker):
    def __init__(self, number: int, inbox: Inbox, orders: bytes) -> None:
        super().__init__(number, inbox)
        context: Any = multiprocessing.get_context(start_method())
        self._connection, there = context.Pipe()
        name = f"kdexp worker {number}"
        self._process = context.Process(target=_serve, args=(there,), name=name, daemon=True)
        with without_main():
            self._process.start()
        there.close()  # the worker's end is its own: when it dies, this one says so
        threading.Thread(target=self._read, name=f"{name}'s news", daemon=True).start()
        with suppress(OSError):  # it has died: its connection says so
            self._connection.send_bytes(orders)

    def _send(self, message: Job | Verdict) -> None:
        with suppress(OSError):  # it has died: its connection says so
            self._connection.send_bytes(pickle.dumps(message))

    def stop(self) -> None:
        self._process.terminate()

    def join(self, seconds: float) -> bool:
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        self._process.kill()

    def _read(self) -> None:
        """Empty the pipe into the inbox, until it is closed."""
        failure: _Failure | None = None
        while True:
            try:
                # our own worker's
                message = pickle.loads(self._connection.recv_bytes())  # noqa: S301
            except (EOFError, OSError, pickle.UnpicklingError):  # closed, or torn in a message
                break
            if isinstance(message, _Failure):
                failure = message
            else:
                self._inbox.put((self, message))
        self._process.join()
        code = self._process.exitcode
        died = Died(failure.why, failure.trace) if failure else Died(_died_of(code))
        self._inbox.put((self, died))


def _died_of(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        short = " (the system does that where memory is short)" if name == "SIGKILL" else ""
        return f"killed by {name}{short}"
    return "stopped" if code == INTERRUPTED else f"exit code {code}"


# --- a process, as it sees itself ---


def _serve(connection: Connection) -> None:
    """A process's whole life: its orders, then one job after another."""
    try:
        open_streams()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "SIGHUP"):  # our command stops us, once it has heard of it
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopped = threading.Event()

        def pulse() -> None:  # where what was raised in the middle of a library came to nothing
            if stopped.is_set():
                raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, partial(_interrupt_once, stopped))
        threading.Thread(target=_stop_without_parent, daemon=True).start()
        orders: _Orders = pickle.loads(connection.recv_bytes())  # noqa: S301 - our parent's own
        configure(orders.device, orders.threads)
        say, hear = _lines(connection)
        while True:
            pulse()
            message = pickle.loads(connection.recv_bytes())  # noqa: S301 - our parent's own
            if isinstance(message, Job):  # not a verdict that came too late
                work(message, orders.prepared, say, hear, pulse)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):  # stopped, or our command is gone
        sys.exit(INTERRUPTED)
    except Exception as error:
        with suppress(OSError):
            failure = _Failure(in_one_line(error), traceback.format_exc())
            connection.send_bytes(pickle.dumps(failure))
        sys.exit(1)


def _lines(
    connection: Connection,
) -> tuple[Callable[[Message], None], Callable[[float], Verdict | None]]:
    """How a job's messages go out, and how verdicts come in."""

    def say(message: Message) -> None:
        connection.send_bytes(pickle.dumps(message))

    def hear(seconds: float) -> Verdict | None:
        if not connection.poll(seconds):
            return None
        found: Verdict = pickle.loads(connection.recv_bytes())  # noqa: S301 - our parent's own
        return found

    return say, hear


def _interrupt_once(stopped: threading.Event, *_: object) -> NoReturn:
    stopped.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being closed is not interrupted again
    raise KeyboardInterrupt


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _thread.interrupt_main(signal.SIGTERM)
