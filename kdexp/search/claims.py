"""Who trains which trial: claims in the study's own database, lost only by who is gone.

A *claimant* is one command. A *claim* is a row of the table kdexp_claims: a name, the claimant, and
a *fencing token*, a number that grows by one whenever the claim passes to somebody else. While it
lives, a claimant holds a lock of its own, which nobody has to renew. On PostgreSQL it is an
advisory lock of one connection: the server frees it when the connection ends. With SQLite it is a
lock on a file beside the database: the system frees it even after kill -9.

Invariants:

1. A claim passes on by compare-and-set of its token: of any number that try at once, one succeeds.
2. It passes on only when its claimant has handed it back, or when that claimant's lock is free.
3. A lock on PostgreSQL must first be seen free for GRACE_SECONDS, without a break: by one
   connection of the observer's, on the observer's own monotonic clock, and while the claimant has
   not come back in between. A server that restarts breaks every connection, so everybody's grace
   begins after everybody could come back. A living claimant does so within seconds, and takes its
   lock again. So an outage, however long, takes nothing from the living.
4. A result is told inside `fenced`, which holds the claim's row: the token cannot change meanwhile.
5. No clock of one machine is compared with another's, and no number here is a time.
6. Who lives is one question for all claims at once: requests do not grow with claims or claimants.

What this does not cover. A claimant that the network has cut off for longer than the grace looks
like one that is gone: it may lose its trials, and by 4 its results are then refused. Connections
must be real ones: a pooler that gives each transaction another one frees advisory locks at once. On
other databases the locks are files in --stores, and another's claims are never taken over.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import sqlalchemy
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, NullPool, select
from sqlalchemy.exc import (
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.schema import CreateTable

from kdexp import KdexpError
from kdexp.files import write_atomically
from kdexp.patience import PATIENCE, patiently
from kdexp.runs.schema import NOTICED, reaching
from kdexp.settings import Settings, without_credentials
from kdexp.urls import sqlite_file

__all__ = [
    "AWAY",
    "Claim",
    "ClaimLost",
    "Claimant",
    "HandedBack",
    "Held",
    "Standing",
    "network_drive",
]

# More than a living claimant needs: to notice a broken connection 14, to wait 2, to connect 10.
GRACE_SECONDS = 30.0
KEEP_SECONDS = 2.0  # between two looks at one's own connection
POLL_SECONDS = 1.0  # between two tries for a named lock
AWAY = (OperationalError, InterfaceError)
NETWORK_DRIVES = ("nfs", "lustre", "cifs", "smb", "beegfs", "ceph", "gpfs", "9p", "fuse.sshfs")
T = TypeVar("T")
log = logging.getLogger("kdexp")

HandedBack = Literal["released", "failed"]
"""How a claimant has left what it claimed: stopped cleanly, or failed by itself."""

_TABLE = sqlalchemy.Table(
    "kdexp_claims",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("name", sqlalchemy.String(200), primary_key=True),
    sqlalchemy.Column("token", sqlalchemy.BigInteger, nullable=False),
    sqlalchemy.Column("claimant", sqlalchemy.String(64), nullable=False),
    sqlalchemy.Column("handed_back", sqlalchemy.String(16), nullable=False),
)


class ClaimLost(KdexpError):
    """Somebody else holds the claim by now."""


@dataclass(frozen=True)
class Claim:
    """A claim as the table has it."""

    token: int
    claimant: str
    handed_back: HandedBack | Literal[""]


@dataclass(frozen=True)
class Standing:
    """What may be done with a claim: nothing while it is held, or in doubt; or taking it."""

    claim: Claim | None
    state: Literal["held", "doubtful", "free"]


@dataclass(frozen=True)
class Held:
    """A claim of one's own."""

    name: str
    token: int


class Claimant:
    """This command among all that share a storage; a context manager that holds its lock inside.

    Any thread may call it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._url = settings, settings.storage_url
        self._locks: _Locks = (
            _Session(self._url)
            if _is_postgresql(self._url)
            else _Files(self._url, _folder(settings))
        )
        self.name = self._locks.name
        self._mine: set[str] = set()
        self._free_since: dict[tuple[str, int], float] = {}
        """When a claimant, in which of its connections, was first seen without its lock."""
        self._seen_by = 0
        """The connection of ours that has seen this."""

    def __enter__(self) -> Claimant:
        self._locks.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock, and of the database. One who only looks has nothing else to do."""
        self._locks.release()

    @cached_property
    def turn(self) -> FileLock:
        """Held by the one command here that is taking a trial: it spares others a vain attempt."""
        return FileLock(_folder(self._settings) / "turn.lock")

    def look(self, names: Sequence[str]) -> dict[str, Standing]:
        """How each of these claims stands."""
        if not names:
            return {}
        return self._run(lambda connection: self._standings(connection, names))

    def take(self, name: str, known: Claim | None) -> Held | None:
        """Claim what stood like this when it was looked at; None where somebody else was faster."""
        token = known.token + 1 if known else 1
        former = (
            known.claimant
            if known and not known.handed_back and known.claimant != self.name
            else ""
        )

        def compare_and_set(connection: Connection) -> bool:
            if former and not self._locks.stays_free(connection, former):
                return False
            if known is None:
                row = {"name": name, "token": token, "claimant": self.name, "handed_back": ""}
                connection.execute(_TABLE.insert().values(row))
                return True
            return _set(
                connection, name, known.token, token=token, claimant=self.name, handed_back=""
            )

        try:
            if not self._run(compare_and_set):
                return None
        except IntegrityError:
            return None
        self._mine.add(name)
        return Held(name, token)

    def owns(self, held: Held) -> bool:
        """Whether a claim is still one's own."""
        return self._run(
            lambda connection: _read(connection, [held.name]).get(held.name)
        ) == self._as_held(held)

    @contextmanager
    def fenced(self, held: Held) -> Iterator[None]:
        """In here a claim cannot pass on. Raises ClaimLost where it has."""
        with self._locks.transaction() as connection:
            query = select(_TABLE).where(_TABLE.c.name == held.name).with_for_update()
            row = connection.execute(query).first()
            if row is None or _claim(row) != self._as_held(held):
                self._mine.discard(held.name)
                raise ClaimLost("another command has taken it over while this one was cut off")
            yield

    def settled(self, held: Held) -> None:
        """The result is told: there is nothing left to claim."""
        self._mine.discard(held.name)

    def hand_back(self, held: Held, how: HandedBack) -> None:
        """Leave a claim, if it is still one's own, to whoever looks for one next."""
        self._mine.discard(held.name)
        self._run(lambda connection: _set(connection, held.name, held.token, handed_back=how))

    @contextmanager
    def lock(self, name: str, patient: bool = True) -> Iterator[bool]:
        """Whether that name is ours alone in here, on this storage; patiently, it will be."""
        with self._locks.named(name, patient) or self._claimed(name, patient) as ours:
            yield ours

    @contextmanager
    def _claimed(self, name: str, patient: bool) -> Iterator[bool]:
        held = self._waited_for(name, patient)
        try:
            yield held is not None
        finally:
            if held:
                with suppress(*AWAY):  # then it is found without its claimant
                    self.hand_back(held, "released")

    def _waited_for(self, name: str, patient: bool) -> Held | None:
        while True:
            try:
                held = patiently(
                    lambda: self._tried(name),
                    lambda error: isinstance(error, AWAY),
                    PATIENCE,
                    "The storage",
                )
            except AWAY as error:
                raise KdexpError(
                    f"The storage {without_credentials(self._url)} has gone away"
                ) from error
            if held or not patient:
                return held
            time.sleep(POLL_SECONDS)

    def _tried(self, name: str) -> Held | None:
        standing = self.look([name])[name]
        free = standing.state == "free" or standing.claim is None
        return self.take(name, standing.claim) if free else None

    def _as_held(self, held: Held) -> Claim:
        return Claim(held.token, self.name, "")

    def _standings(self, connection: Connection, names: Sequence[str]) -> dict[str, Standing]:
        claims = _read(connection, names)
        others = {claim.claimant for claim in claims.values() if not claim.handed_back} - {
            self.name
        }
        living = self._locks.living(connection, others)
        times = self._locks.connections(connection, others - living)
        missing = {(name, 0) for name in names if name not in claims}
        gone = self._gone({(name, times.get(name, 0)) for name in others - living} | missing)
        return {name: self._standing(name, claims.get(name), living, gone) for name in names}

    def _standing(
        self, name: str, claim: Claim | None, living: set[str], gone: set[str]
    ) -> Standing:
        if claim is None:  # its asker may be about to claim it
            return Standing(None, "free" if name in gone else "doubtful")
        if claim.handed_back:
            return Standing(claim, "free")
        if claim.claimant == self.name:  # not in _mine: the answer to that request was lost
            return Standing(claim, "held" if name in self._mine else "free")
        if claim.claimant in living:
            return Standing(claim, "held")
        return Standing(claim, "free" if claim.claimant in gone else "doubtful")

    def _gone(self, free: set[tuple[str, int]]) -> set[str]:
        """Whose lock has been seen free for long enough."""
        now = time.monotonic()
        kept = self._free_since if self._seen_by == self._locks.number else {}
        self._seen_by = self._locks.number
        self._free_since = {key: since for key, since in kept.items() if key in free}
        for key in free:
            self._free_since.setdefault(key, now)
        return {key[0] for key in free if now - self._free_since[key] >= self._locks.grace}

    def _run(self, work: Callable[[Connection], T]) -> T:
        with self._locks.transaction() as connection:
            return work(connection)


class _Locks(Protocol):
    """A database, and how claimants are seen to live there."""

    name: str
    """The claimant's own."""
    number: int
    """Of its connections so far: what was seen by an earlier one is not known to have lasted."""

    @property
    def grace(self) -> float:
        """Seconds for which a lock must be seen free."""

    def hold(self) -> None: ...
    def release(self) -> None: ...
    def transaction(self) -> AbstractContextManager[Connection]: ...
    def living(self, connection: Connection, names: set[str]) -> set[str]: ...
    def connections(self, connection: Connection, names: set[str]) -> dict[str, int]: ...
    def stays_free(self, connection: Connection, name: str) -> bool: ...
    def named(self, name: str, patient: bool) -> AbstractContextManager[bool] | None: ...


class _Files:
    """Locks on files of one folder. They cannot be lost while their process lives: there is no
    grace.
    """

    number, grace = 0, 0.0

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder, self._place = url, folder, _place(folder)
        self.name = f"{uuid.uuid4().hex[:12]}@{self._place}"
        self._own = FileLock(folder / f"{self.name}.lock", thread_local=False)
        self._looking = FileLock(folder / "look.lock")
        self._made: Engine | None = None

    def hold(self) -> None:
        _warn_of_network_drive(self._folder)
        # between a file's making and its lock nobody may take it for a dead one's
        with self._looking:
            self._own.acquire()
        for path in self._folder.glob("*@*.lock"):
            if path.stem != self.name:
                self._is_held(path.stem)  # of those that were killed nothing stays

    def release(self) -> None:
        self._own.release()
        (self._folder / f"{self.name}.lock").unlink(missing_ok=True)
        if self._made:
            self._made.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        if self._made is None:
            made = sqlalchemy.create_engine(self._url, connect_args=reaching(self._url))
            with made.connect() as connection:
                _make_table(connection)
            self._made = made
        with self._made.begin() as connection:
            yield connection

    def living(self, connection: Connection, names: set[str]) -> set[str]:
        return {name for name in names if not self._here(name) or self._is_held(name)}

    def connections(self, connection: Connection, names: set[str]) -> dict[str, int]:
        return {}

    def stays_free(self, connection: Connection, name: str) -> bool:
        return True

    def named(self, name: str, patient: bool) -> AbstractContextManager[bool]:
        return _file_lock(self._folder / f"{_digest(name).hex()}.lock", patient)

    def _here(self, name: str) -> bool:
        """Whether a claimant of that name would be seen here."""
        return name.partition("@")[2] == self._place

    def _is_held(self, name: str) -> bool:
        path = self._folder / f"{name}.lock"
        if not path.exists():
            return False
        # a look takes the lock for a moment: another must not take that for life
        with self._looking:
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
            with suppress(OSError):
                path.unlink()
        return False


class _Session:
    """One connection to PostgreSQL. Its end frees the lock; a thread makes it again where it
    breaks.
    """

    def __init__(self, url: str) -> None:
        self.name, self.number, self._holds, self._held = uuid.uuid4().hex[:16], 0, False, False
        names = {"application_name": f"kdexp {self.name}"}
        self._engine = sqlalchemy.create_engine(
            url, poolclass=NullPool, connect_args=reaching(url) | names
        )
        self._mutex = threading.RLock()
        self._connection: Connection | None = None
        self._stop = threading.Event()

    @property
    def grace(self) -> float:
        return GRACE_SECONDS

    def hold(self) -> None:
        self._holds = True
        with suppress(*AWAY):  # whoever asks first waits for it
            self._look_after()
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        self._stop.set()
        with self._mutex:
            if self._connection is not None:
                with suppress(SQLAlchemyError), self._connection.begin():
                    self._connection.execute(
                        _TABLE.delete().where(_TABLE.c.name == _own_row(self.name))
                    )
            self._holds = self._held = False
            self._drop()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self._mutex:
            connection = self._open()
            try:
                with connection.begin():
                    yield connection
            except (IntegrityError, KdexpError):
                raise
            except BaseException as error:
                if isinstance(error, SQLAlchemyError | KeyboardInterrupt):
                    self._drop()
                raise

    def living(self, connection: Connection, names: set[str]) -> set[str]:
        if not names:
            return set()
        held = {tuple(row) for row in connection.execute(_HELD)}
        return {name for name in names if _halves(_key(name)) in held}

    def connections(self, connection: Connection, names: set[str]) -> dict[str, int]:
        if not names:
            return {}
        found = _read(connection, [_own_row(name) for name in names])
        return {claim.claimant: claim.token for claim in found.values()}

    def stays_free(self, connection: Connection, name: str) -> bool:
        """Take a gone claimant's lock until the transaction ends, so that it cannot come back in
        the middle.
        """
        return bool(
            connection.scalar(select(sqlalchemy.func.pg_try_advisory_xact_lock(_key(name))))
        )

    def named(self, name: str, patient: bool) -> None:
        return None

    def _keep(self) -> None:
        while not self._stop.wait(KEEP_SECONDS):
            with suppress(Exception):  # a server that is away is tried again
                self._look_after()

    def _look_after(self) -> None:
        with self._mutex:
            if self._stop.is_set():
                return
            with self.transaction() as connection:
                if self._held:
                    connection.execute(select(1))
                elif not self._take_own(connection):
                    # The server has not noticed that our former connection is gone.
                    connection.execute(_END_FORMER, {"name": f"kdexp {self.name}"})

    def _open(self) -> Connection:
        if self._connection is None:
            self._connection, self._held = self._engine.connect(), False
            try:
                self._prepare(self._connection)
            except BaseException:
                self._drop()
                raise
        return self._connection

    def _prepare(self, connection: Connection) -> None:
        """Take the lock again, and let those who saw it free know that we were here."""
        self.number += 1
        for statement in _NOTICE_THE_DEAD:
            with connection.begin():
                connection.execute(sqlalchemy.text(statement))
        _make_table(connection)
        if self._holds:
            with connection.begin():
                self._take_own(connection)
                own = _own_row(self.name)
                if not _set(connection, own, None, token=self.number):
                    row = {"name": own, "token": self.number, "claimant": self.name}
                    connection.execute(_TABLE.insert().values(row | {"handed_back": ""}))

    def _take_own(self, connection: Connection) -> bool:
        lock = sqlalchemy.func.pg_try_advisory_lock(_key(self.name))
        self._held = bool(connection.scalar(select(lock)))
        return self._held

    def _drop(self) -> None:
        connection, self._connection, self._held = self._connection, None, False
        if connection is not None:
            with suppress(Exception):
                connection.invalidate()
            with suppress(Exception):
                connection.close()


_HELD = sqlalchemy.text(
    "select classid::bigint, objid::bigint from pg_locks where locktype = 'advisory' and objsubid ="
    " 1 and granted and database = (select oid from pg_database where datname = current_database())"
)
_END_FORMER = sqlalchemy.text(
    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = :name and pid"
    " <> pg_backend_pid()"
)
# A machine that vanished without a word frees its lock as soon as the server's end notices.
_NOTICE_THE_DEAD = tuple(
    f"set tcp_{name.removeprefix('tcp_')} = {value}" for name, value in NOTICED.items()
)


def network_drive(path: Path, mounts: str) -> str:
    """The kind of network file system that a path lies on, by the system's list of mounts; or
    nothing.
    """
    rows = [line.split() for line in mounts.splitlines()]
    above = [
        row for row in rows if len(row) > 2 and path.is_relative_to(row[1].replace("\\040", " "))
    ]
    kind = max(above, key=lambda row: len(row[1]), default=["", "", ""])[2]
    return kind if kind.startswith(NETWORK_DRIVES) else ""


def _warn_of_network_drive(folder: Path) -> None:
    mounts = Path("/proc/mounts")
    if multiprocessing.parent_process() or not mounts.exists():
        return
    if kind := network_drive(folder, mounts.read_text("utf-8", "replace")):
        log.warning(
            f"{folder.parent} is on a network drive ({kind}), whose file locks other machines may"
            " not see: let one machine at a time work there; several need --storage"
            " postgresql://USER@HOST/DB"
        )


def _folder(settings: Settings) -> Path:
    """Where lock files are: beside an SQLite database, whatever its commands' --stores; else
    there.
    """
    if file := sqlite_file(settings.storage_url):
        folder = file.resolve().with_name(f"{file.resolve().name}-claims")
    else:
        folder = settings.stores.resolve() / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _place(folder: Path) -> str:
    """What names a folder of locks, whatever host or container it is seen from."""
    file = folder / "place"
    with FileLock(folder / "place.lock"):
        if not file.exists():
            write_atomically(file, lambda path: path.write_text(uuid.uuid4().hex[:8], "utf-8"))
    return file.read_text("utf-8")


@contextmanager
def _file_lock(path: Path, patient: bool) -> Iterator[bool]:
    file = FileLock(path)
    try:
        file.acquire(blocking=patient)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file.release()


def _is_postgresql(url: str) -> bool:
    return url.startswith(("postgresql", "postgres:"))


def _make_table(connection: Connection) -> None:
    for attempt in (1, 2):  # two that make it at the same moment disturb each other once
        try:
            with connection.begin():
                connection.execute(CreateTable(_TABLE, if_not_exists=True))
            return
        except (IntegrityError, ProgrammingError) as error:
            if attempt == 2:
                why = without_credentials(str(error.orig).splitlines()[0])
                raise KdexpError(f"The storage takes no table {_TABLE.name}: {why}") from error


def _read(connection: Connection, names: Sequence[str]) -> dict[str, Claim]:
    rows = connection.execute(select(_TABLE).where(_TABLE.c.name.in_(names)))
    return {row.name: _claim(row) for row in rows}


def _claim(row: Any) -> Claim:
    return Claim(row.token, row.claimant, row.handed_back)


def _set(connection: Connection, name: str, known: int | None, **values: object) -> bool:
    """Change a row that has this token (None: any); whether there was one."""
    at = _TABLE.c.name == name
    at = at if known is None else at & (_TABLE.c.token == known)
    return connection.execute(_TABLE.update().where(at).values(values)).rowcount == 1


def _own_row(name: str) -> str:
    """Where a claimant counts its connections."""
    return f"claimant {name}"


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"kdexp {name}".encode()).digest()[:8]


def _key(name: str) -> int:
    """A claimant's advisory lock."""
    return int.from_bytes(_digest(name), "big", signed=True)


def _halves(key: int) -> tuple[int, int]:
    """The same as pg_locks shows it."""
    return (key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF
