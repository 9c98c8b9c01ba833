"""Writes that matter: a file is there whole, or as it was before. And what a file is known by."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from kdexp import KdexpError

__all__ = [
    "check_output",
    "settle",
    "sha256_of",
    "write_ahead",
    "write_atomically",
    "write_output",
]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then rename it there: whole, or not at all.

    Its mode is what any new file's is here, by the umask: others may share the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not by the file's name, which may be as long as names can be
    temporary = path.parent / f".{uuid.uuid4().hex}.partial"
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_output(option: str, file: Path, example: str, shown: Callable[[Path], str] = str) -> None:
    """That a file which an option names can be meant to be written, before the work for it. Raises
    KdexpError.
    """
    if file.is_dir():
        raise KdexpError(
            f"{option} {shown(file)}: is a folder; name a file in it, such as"
            f" {shown(file / example)}"
        )


def write_output(
    option: str,
    file: Path,
    write: Callable[[Path], object],
    shown: Callable[[Path], str] = str,
) -> None:
    """Write the file that an option names, whole or not at all. Raises KdexpError."""
    try:
        write_atomically(file, write)
    except OSError as error:
        raise KdexpError(
            f"{option} {shown(file)}: cannot be written: {error.strerror}; name another file"
        ) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_ahead(database: Path) -> None:
    """Let an SQLite database append its changes to a log beside it: a commit takes a third of the
    time.

    Where it cannot be switched now (read-only, in use) it works all the same.
    """
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(database, timeout=60)) as connection,
    ):
        connection.execute("pragma journal_mode = wal")


def settle(database: Path) -> None:
    """Take what an SQLite database's log holds into its file, so that a copy of the file alone has
    all.

    Where others use it now, they do that when they end.
    """
    if database.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(database, timeout=1)) as connection:
            connection.execute("pragma wal_checkpoint(truncate)")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
