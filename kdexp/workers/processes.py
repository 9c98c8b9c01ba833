"""How worker processes are made."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, util
from types import ModuleType

from kdexp import KdexpError

__all__ = ["start_method", "warm_up", "without_main"]

# bytes, of the 108 that a socket's path may have: multiprocessing adds
# /pymp-xxxxxxxx/listener-xxxxxxxx
SOCKET_ROOM = 60


def warm_up() -> None:
    """Begin to import what worker processes need, beside whatever this process does meanwhile: some
    seconds.
    """
    if start_method() != "forkserver":
        return
    _make_room_for_sockets()
    with _deaf(signal.SIGINT), _deaf(getattr(signal, "SIGHUP", None)):
        forkserver.set_forkserver_preload(["kdexp.workers.preload"])
        forkserver.ensure_running()


@contextlib.contextmanager
def _deaf(kind: signal.Signals | None) -> Iterator[None]:
    """Ignore a signal in here, and in whatever is started here: Ctrl-C and a hang-up are for this
    process alone.
    """
    before = signal.signal(kind, signal.SIG_IGN) if kind else None
    try:
        yield
    finally:
        if kind:
            signal.signal(kind, before)


def _make_room_for_sockets() -> None:
    """Where TMPDIR is too deep for a socket's path, multiprocessing keeps its own in a folder that
    is not.
    """
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_ROOM:
        return
    # mkdtemp's within
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108
        if not folder or len(os.fsencode(folder)) > SOCKET_ROOM:
            continue
        try:
            tempfile.tempdir = folder
            util.get_temp_dir()  # is made once, and kept
        except OSError:
            continue
        finally:
            tempfile.tempdir = before
        return
    raise KdexpError(
        f"{tempfile.gettempdir()}: too deep for the sockets of workers; set TMPDIR to a short path,"
        " such as /tmp"
    )


def start_method() -> str:
    """How worker processes are made here: forked from a server of their own where there is such a
    thing.
    """
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """A process that is started in here does not import the program again that starts it: a script
    needs no `if __name__ == "__main__"`, and nothing of it runs twice.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
