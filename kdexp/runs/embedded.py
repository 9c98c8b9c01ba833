"""The embedded MLflow store's artifacts: found below the folder that is open, wherever that is now.

MLflow writes absolute addresses into its database. A store that was moved, copied or mounted
elsewhere would go on reading and writing the folder it came from. So kdexp takes only the end of an
address (experiment, run) and looks below its own folder; nothing outside is read or written. For
MLflow's own tools (its UI, `load_model`) the command that opens a store puts the addresses right as
well, in one transaction. While a `kdexp ui` shows the store it leaves them: two who see one folder
at two paths need not agree, since kdexp itself never follows them.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

__all__ = [
    "folder_for",
    "is_local",
    "model_place",
    "readdressed",
    "run_ids",
    "run_place",
    "shown",
    "study_names",
]

ARTIFACTS = "artifacts"
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]{0,59}")
UI_LOCK = ".ui.lock"
SHOWN = 100  # runs that a shell is offered


def folder_for(experiment: str) -> str:
    """The folder of a new experiment's artifacts: its name, or where that is no good name of a
    folder one made of it.
    """
    if PLAIN.fullmatch(experiment):
        return experiment
    short = re.sub(r"[^A-Za-z0-9_.+\-]+", "-", experiment)[:40].strip("-.")
    return f"{short or 'experiment'}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"


def is_local(address: str) -> bool:
    """Whether an address is a folder here, not a server's or a bucket's."""
    return address.startswith(("file:", "/")) or "://" not in address


def run_place(stores: Path, address: str, experiment_id: str, run_id: str) -> Path:
    """The folder of a run's artifacts below these stores; `address` is what MLflow recorded."""
    return (
        _experiment(stores, _folders(address), experiment_id, (run_id, ARTIFACTS))
        / run_id
        / ARTIFACTS
    )


def model_place(stores: Path, source: str, run_id: str, run: Path) -> Path | None:
    """Where a registered version of a run's model is; None where its address does not lie within
    the run's.
    """
    parts = _folders(source)
    for at in range(len(parts) - 1, 0, -1):
        if parts[at - 1 : at + 1] == (run_id, ARTIFACTS):
            return run.joinpath(*parts[at + 1 :])
    return None


def _experiment(
    stores: Path, parts: tuple[str, ...], experiment_id: str, end: tuple[str, ...]
) -> Path:
    """The folder of an experiment below these stores, from an address that ends with this."""
    above = parts[: len(parts) - len(end)] if parts[len(parts) - len(end) :] == end else ()
    if len(above) > 1 and above[-2] == ARTIFACTS and above[-1] not in (".", ".."):
        return stores / ARTIFACTS / above[-1]
    if above and above[-1] == experiment_id and (stores / experiment_id).is_dir():
        return stores / experiment_id  # of the experiment Default, which MLflow makes itself
    return stores / ARTIFACTS / experiment_id


def _folders(address: str) -> tuple[str, ...]:
    path = (
        unquote(address.removeprefix("file:").partition("#")[0])
        if address.startswith("file:")
        else address
    )
    return tuple(part for part in path.split("/") if part)


# --- the addresses in the database ---


@contextmanager
def shown(stores: Path) -> Iterator[None]:
    """In here MLflow's UI shows the store: its addresses stay as they are."""
    lock = FileLock(stores / UI_LOCK, timeout=0)
    with suppress(Timeout):  # another UI holds it already
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def readdressed(stores: Path) -> None:
    """Let the addresses in the embedded database lead below this folder (absolute). Where they do,
    nothing is written.
    """
    # read-only, or in use: kdexp itself needs none of them
    unneeded = suppress(sqlite3.OperationalError, Timeout, OSError)
    with unneeded, closing(_opened(stores)) as database:
        if not _changes(database, stores):
            return
        with FileLock(stores / UI_LOCK, timeout=0), _transaction(database):
            # again: another command may have done it meanwhile
            for statement, values in _changes(database, stores):
                database.execute(statement, values)


def study_names(stores: Path) -> list[str]:
    """The studies of a store, the latest first; none is made. Raises sqlite3.Error."""
    rows = _read(
        stores,
        "select name.value, max(run.start_time) from runs run"
        " join tags kind on kind.run_uuid = run.run_uuid and kind.key = 'kdexp.kind'"
        " join tags name on name.run_uuid = run.run_uuid and name.key = 'kdexp.study'"
        " where kind.value = 'study' and run.lifecycle_stage = 'active'"
        " group by name.value order by 2 desc",
    )
    return [name for name, _ in rows]


def run_ids(stores: Path, beginning: str) -> list[tuple[str, str]]:
    """The latest trainings of a store whose ID begins so, each with its name; none is made. Raises
    sqlite3.Error.
    """
    return _read(
        stores,
        "select run.run_uuid, coalesce(run.name, '') from runs run"
        " join tags kind on kind.run_uuid = run.run_uuid and kind.key = 'kdexp.kind'"
        " where kind.value <> 'study' and run.lifecycle_stage = 'active'"
        " and substr(run.run_uuid, 1, length(?1)) = ?1 order by run.start_time desc limit ?2",
        (beginning, SHOWN),
    )


def _read(stores: Path, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    address = f"file:{quote(str((stores / 'mlflow.db').resolve()))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=0.2)) as database:
        return database.execute(query, values).fetchall()


def _opened(stores: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(stores / 'mlflow.db'))}?mode=rw",
        uri=True,
        timeout=60,
        isolation_level=None,
    )


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("begin immediate")
    try:
        yield
        database.execute("commit")
    except BaseException:
        database.execute("rollback")
        raise


def _changes(database: sqlite3.Connection, stores: Path) -> list[tuple[str, tuple[str, ...]]]:
    changes: list[tuple[str, tuple[str, ...]]] = []
    for number, address in database.execute(
        "select experiment_id, artifact_location from experiments"
    ):
        place = _experiment(stores, _folders(address or ""), str(number), ())
        if is_local(address or "") and address != place.as_uri():
            changes.append(
                (
                    "update experiments set artifact_location = ? where experiment_id = ?",
                    (place.as_uri(), number),
                )
            )
    inside = f"{(stores / ARTIFACTS).as_uri()}/"
    for run_id, number, address in database.execute(
        "select run_uuid, experiment_id, artifact_uri from runs where artifact_uri is null or"
        " substr(artifact_uri, 1, ?) != ?",
        (len(inside), inside),
    ):
        place = run_place(stores, address or "", str(number), run_id)
        if is_local(address or "") and address != place.as_uri():
            changes.append(
                ("update runs set artifact_uri = ? where run_uuid = ?", (place.as_uri(), run_id))
            )
    for column in ("source", "storage_location"):
        for name, version, address, run_id, number, recorded in database.execute(
            f"select model_versions.name, version, {column}, "  # noqa: S608 - two names
            "run_id, experiment_id, artifact_uri from model_versions join runs on run_uuid = run_id"
            f" where {column} is not null and substr({column}, 1, ?) != ?",
            (len(inside), inside),
        ):
            run = run_place(stores, recorded or "", str(number), run_id)
            model = model_place(stores, address, run_id, run) if is_local(address) else None
            if model and address != model.as_uri():
                statement = f"update model_versions set {column} = ? where name = ? and version = ?"  # noqa: S608
                changes.append((statement, (model.as_uri(), name, version)))
    for model_id, number, address in database.execute(
        "select model_id, experiment_id, artifact_location from logged_models where"
        " substr(artifact_location, 1, ?) != ?",
        (len(inside), inside),
    ):
        end = ("models", model_id, ARTIFACTS)
        if is_local(address or "") and _folders(address)[-3:] == end:
            model_at = _experiment(stores, _folders(address), str(number), end).joinpath(*end)
            changes.append(
                (
                    "update logged_models set artifact_location = ? where model_id = ?",
                    (model_at.as_uri(), model_id),
                )
            )
    return changes
