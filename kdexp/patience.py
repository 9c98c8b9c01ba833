"""How a server that is away is waited for: one way for all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["PATIENCE", "patiently"]

PATIENCE = 300.0  # seconds that a server may be away
PAUSE, LONGEST_PAUSE = 0.5, 5.0
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
