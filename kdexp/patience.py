"""How a server that is away is waited for, one way for all; and what no stop breaks off."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

__all__ = ["PATIENCE", "patiently", "whole"]

PATIENCE = 300.0  # seconds that a server may be away
PAUSE, LONGEST_PAUSE = 0.5, 5.0
STOPS = [getattr(signal, kind) for kind in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, kind)]
T = TypeVar("T")
log = logging.getLogger("kdexp")


def patiently(
    call: Callable[[], T], may_pass: Callable[[Exception], bool], seconds: float, server: str
) -> T:
    """What `call` gives, tried again for so many seconds while its error may pass. Raises its last
    error.
    """
    deadline, pause = time.monotonic() + seconds, PAUSE
    while True:
        try:
            return call()
        except Exception as error:
            if not may_pass(error) or time.monotonic() >= deadline:
                raise
        if pause == 2 * PAUSE:  # not for a single request
            log.warning("%s does not answer; waiting for it (up to %.0f s)", server, seconds)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


@contextmanager
def whole() -> Iterator[None]:
    """What is done in here is done to its end: Ctrl-C, a hang-up or SIGTERM is heard after it, a
    second one at once.

    A transaction that is broken off in the middle may keep its lock on a database, and closing what
    is open would then wait for itself.
    """
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def later(number: int, frame: FrameType | None) -> None:
        if came:
            handlers[number](number, frame)
        came.append((number, frame))

    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, later)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)
