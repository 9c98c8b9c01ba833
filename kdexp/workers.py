"""Which processes are alive: each worker holds a lock file while it lives, and the system frees it even after kill -9."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver, util
from pathlib import Path

from filelock import FileLock, Timeout

from kdexp import KdexpError
from kdexp.files import write_atomically

__all__ = ["Worker", "start_method", "warm_up"]

SOCKET_ROOM = 60  # bytes, of the 108 that a socket's path may have: multiprocessing adds /pymp-xxxxxxxx/listener-xxxxxxxx


class Worker:
    """This process among those that share a folder of stores; a context manager that is alive inside."""

    def __init__(self, stores: Path) -> None:
        self.folder = stores / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.turn = FileLock(stores / ".ask.lock")
        """Held by the one worker that is taking a trial."""
        with self.turn:
            self.place = _place(self.folder)
        self.name = f"{uuid.uuid4().hex[:12]}@{self.place}"
        self._lock = FileLock(self.folder / f"{self.name}.lock")

    def __enter__(self) -> Worker:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        (self.folder / f"{self.name}.lock").unlink(missing_ok=True)

    def knows(self, name: str) -> bool:
        """Whether a worker of that name would be seen here: it shares this folder."""
        return name.partition("@")[2] == self.place

    def sees_alive(self, name: str | None) -> bool:
        """Whether another worker of that name, sharing this folder, lives."""
        if name is None or name == self.name:
            return False
        path = self.folder / f"{name}.lock"
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False


def _place(folder: Path) -> str:
    """What names a folder of workers, whatever host or container it is seen from."""
    file = folder / "place"
    if not file.exists():
        write_atomically(file, lambda path: path.write_text(uuid.uuid4().hex[:8], "utf-8"))
    return file.read_text("utf-8")


def warm_up() -> None:
    """Begin to import what worker processes need, beside whatever this process does meanwhile: some seconds."""
    if start_method() != "forkserver":
        return
    _make_room_for_sockets()
    with _deaf(signal.SIGINT), _deaf(getattr(signal, "SIGHUP", None)):
        forkserver.set_forkserver_preload(["kdexp.preload"])
        forkserver.ensure_running()


@contextlib.contextmanager
def _deaf(kind: signal.Signals | None) -> Iterator[None]:
    """Ignore a signal in here, and in whatever is started here: Ctrl-C and a hang-up are for this process alone."""
    before = signal.signal(kind, signal.SIG_IGN) if kind else None
    try:
        yield
    finally:
        if kind:
            signal.signal(kind, before)


def _make_room_for_sockets() -> None:
    """Where TMPDIR is too deep for a socket's path, multiprocessing keeps its own in a folder that is not."""
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) <= SOCKET_ROOM:
        return
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - mkdtemp's within
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
    raise KdexpError(f"{tempfile.gettempdir()}: too deep for the sockets of workers; set TMPDIR to a short path, such as /tmp")


def start_method() -> str:
    """How worker processes are made here: forked from a server of their own where there is such a thing."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
