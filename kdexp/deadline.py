"""When a command must have ended: after a time that it was given, or with its SLURM job. Standard
library only.
"""

from __future__ import annotations

import _thread
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from kdexp import KdexpError

__all__ = ["Deadline", "seconds_of"]

SOON = 0.001  # seconds, for a time that is up already

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
PART = r"(\d+(?:\.\d+)?)\s*([dhms])"
SLURM_END, RESERVE = "SLURM_JOB_END_TIME", 60.0  # seconds that a job leaves for the way out


class Deadline:
    """A moment of this machine's monotonic clock; never, where `seconds` is None."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @classmethod
    def of(cls, until: str | None, environment: Mapping[str, str] = os.environ) -> Deadline:
        """What a person has given; else a minute before the SLURM job ends, if this is one. Raises
        KdexpError.
        """
        if until is not None:
            return cls(seconds_of(until))
        end = environment.get(SLURM_END, "")
        return cls(float(end) - time.time() - RESERVE if end.isdecimal() else None)

    @property
    def left(self) -> float:
        """Seconds until then; endless where there is none."""
        return float("inf") if self._at is None else self._at - time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Interrupt the main thread then, as Ctrl-C does, if it is still in here. Only it may
        enter.
        """
        if self._at is None:
            yield
            return
        stop = _rung(max(self.left, SOON))
        try:
            yield
        finally:
            stop()


def _rung(seconds: float) -> Callable[[], object]:
    """Let KeyboardInterrupt be raised then, and return what stops that. Not by SIGINT, which jobs
    in the background of a shell ignore.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        timer = threading.Timer(seconds, _thread.interrupt_main)
        timer.daemon = True
        timer.start()
        return timer.cancel
    former = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)

    return stop


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def seconds_of(text: str) -> float:
    """'3h50m', '90m', '1d 6h' in seconds. Raises KdexpError."""
    if not re.fullmatch(rf"(\s*{PART}\s*)+", text):
        raise KdexpError(f"--until {text}: no length of time; give one such as 3h50m, 90m or 45s")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(PART, text))
