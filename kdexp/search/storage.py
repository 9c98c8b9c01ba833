"""Optuna's database: opened, waited for, upgraded."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import optuna
from sqlalchemy import event

from kdexp import KdexpError
from kdexp.patience import PATIENCE, patiently, whole
from kdexp.reading import spellings, study_name
from kdexp.runs.schema import Library, StoreError, fitting, reaching
from kdexp.search import claims
from kdexp.settings import Settings, without_credentials

__all__ = [
    "AWAY",
    "OPTUNA",
    "StudyAway",
    "StudyError",
    "answered",
    "away",
    "open_storage",
    "stored_name",
    "upgrade",
]

AWAY = (*claims.AWAY, optuna.exceptions.StorageInternalError)
# waiting does not help
LASTING = ("disk I/O error", "disk is full", "No space left", "readonly database", "unable to open")
OPTUNA = Library(
    "Optuna",
    "optuna",
    "--storage",
    version("optuna"),
    Path(str(optuna.__file__)).parent / "storages" / "_rdb" / "alembic" / "versions",
    "studies",
)
T = TypeVar("T")


class StudyError(KdexpError):
    """A study that cannot be opened or continued."""


class StudyAway(StudyError):
    """Optuna's storage went away, and did not come back in time."""


def answered(call: Callable[[], T]) -> T:
    """What `call` gives; where the database is away, it is waited for. Raises StudyError where it
    does not come back.
    """

    def asked() -> T:
        with whole():
            return call()

    try:
        return patiently(asked, _may_pass, PATIENCE, "Optuna's storage")
    except AWAY as error:
        raise away(error) from error


def away(error: Exception) -> StudyError:
    """A database that does not answer, in one line."""
    if _may_pass(error):
        return StudyAway(f"Optuna's storage has gone away: {_cause(error)}")
    return StudyError(f"Optuna's storage: {_cause(error)}")


def _may_pass(error: Exception) -> bool:
    return isinstance(error, AWAY) and not any(reason in _cause(error) for reason in LASTING)


def _cause(error: Exception) -> str:
    text = str(error.__cause__ or error)
    return without_credentials(
        next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    )


def stored_name(storage: optuna.storages.BaseStorage, name: str) -> str:
    """A study's name as the storage has it: earlier versions took it as it came, from a Mac's file
    name for example.
    """
    for spelling in spellings(name):
        with suppress(KeyError):
            storage.get_study_id_from_name(spelling)
            return spelling
    return next(
        (
            other
            for other in optuna.get_all_study_names(storage)
            if study_name(other) == study_name(name)
        ),
        name,
    )


def upgrade(url: str) -> None:
    """Take a storage of an older Optuna along to the installed one's tables, by Optuna's own
    scripts.
    """
    try:
        optuna.storages.RDBStorage(
            url, skip_compatibility_check=True, skip_table_creation=True
        ).upgrade()
    except Exception as error:  # SQLAlchemy, Alembic and Optuna each raise their own
        raise StoreError(f"Optuna's own upgrade failed: {str(error).splitlines()[0]}") from error


def open_storage(settings: Settings) -> optuna.storages.RDBStorage:
    """Optuna's storage, its tables made where there are none. Raises StudyError."""
    url = settings.storage_url
    fitting(url, OPTUNA, lambda: None)
    # two machines that make the tables at the same moment disturb each other once
    for attempt in range(3):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine(url))
            if settings.storage is None:
                _commit_quickly(storage)
            return storage
        except Exception as error:  # SQLAlchemy and the database's driver each raise their own
            if attempt < 2 and "already exists" in str(error):
                time.sleep(1)
                continue
            raise StudyError(
                f"Optuna storage {without_credentials(url)}: {_cause(error)}; correct --storage, or"
                " start the database"
            ) from None
    raise AssertionError("unreachable")


def _engine(url: str) -> dict[str, Any]:
    """How Optuna reaches a database: on a server with two connections at most, one for each thread
    that asks.
    """
    few = (
        {"pool_size": 1, "max_overflow": 1, "connect_args": reaching(url)} if reaching(url) else {}
    )
    return {"pool_pre_ping": True} | few


def _commit_quickly(storage: optuna.storages.RDBStorage) -> None:
    """Commit to the log without waiting for the disk: 2.5 ms for a report where it took 5.5.

    Any process may die; a power failure may undo the last commits, and their trial is then trained
    again.
    """
    event.listen(
        storage.engine,
        "connect",
        lambda connection, _: connection.execute("pragma synchronous = normal"),
    )
    storage.engine.dispose()  # connections from before
