"""Which version of a library a database's tables are for: found out before the library itself
touches them.

MLflow and Optuna both keep an Alembic revision in their database; the scripts that lead from one
revision to the next lie in the installed packages. A revision that is among them, and not the last,
is an older version's; one that is not, a newer one's.
"""

from __future__ import annotations

import calendar
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from kdexp import KdexpError
from kdexp.urls import sqlite_file, without_credentials

__all__ = [
    "NOTICED",
    "Library",
    "Schema",
    "StoreError",
    "copy_first",
    "fitting",
    "reaching",
    "restore",
    "schema_of",
]

CONNECT_SECONDS = 10  # that a database's server may take to answer at the start
NOTICED = {
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 14_000,
}
"""How each end of a PostgreSQL connection notices that the other is gone: within 14 seconds. The
last in milliseconds.
"""


class StoreError(KdexpError):
    """A database that cannot be opened, or is not for the installed version of its library."""


@dataclass(frozen=True)
class Library:
    """A library that keeps its records in a database."""

    name: str
    package: str
    option: str
    version: str
    scripts: Path
    """The folder of its migration scripts."""
    table: str
    """One that each of its databases has."""


@dataclass(frozen=True)
class Schema:
    """A database's revision, against the installed library's."""

    library: Library
    found: str
    """Empty: there are no tables yet."""
    wanted: str
    age: Literal["new", "fits", "older", "newer"]
    maker: str
    """What is known of the version that it is for."""


def schema_of(url: str, library: Library) -> Schema:
    """Read a database's revision; nothing is made or changed. Raises StoreError where it cannot be
    read or is another's.
    """
    found, told = _read(url, library)
    scripts = {
        match["revision"]: match
        for path in sorted(library.scripts.glob("*.py"))
        if (match := _script(path))
    }
    wanted = next(iter(scripts.keys() - {match["down"] for match in scripts.values()}))
    if not found:
        return Schema(library, "", wanted, "new", "")
    if found == wanted:
        return Schema(library, found, wanted, "fits", f"{library.name} {library.version}")
    if found not in scripts:
        return Schema(
            library, found, wanted, "newer", f"a newer {library.name} than {library.version}{told}"
        )
    date = re.search(r"Create Date: (\d{4})-(\d\d)", scripts[found].string)
    since = f", with tables as of {calendar.month_name[int(date[2])]} {date[1]}" if date else ""
    number = re.match(r"v(\d+\.\d+\.\d+)", found)  # as Optuna names its revisions
    since = f", with tables as of {library.name} {number[1]}" if number else since
    return Schema(
        library,
        found,
        wanted,
        "older",
        f"an older {library.name} than {library.version}{since}{told}",
    )


def fitting(url: str, library: Library, recorded: Callable[[], str | None]) -> None:
    """Raise StoreError, with what to do, unless a database is new or just right. `recorded`: its
    version by other evidence.
    """
    schema = schema_of(url, library)
    if schema.age in ("new", "fits"):
        return
    known, place = recorded(), without_credentials(url.partition("?")[0])
    shown = f"{library.name}'s database {place} is of {schema.maker} (revision {schema.found})"
    exact = f"pip install {library.package}=={known} (its last run was recorded with that)"
    exact = exact if known and known != library.version else ""
    if schema.age == "older":
        or_else = f"; or {exact}" if exact else ""
        raise StoreError(f"{shown}: kdexp doctor --upgrade copies it and takes it along{or_else}.")
    newest = f"or the newest (pip install -U {library.package})"
    install = exact or f"install the {library.name} that made it, {newest}"
    raise StoreError(f"{shown}, and cannot be taken back: {install}.")


def reaching(url: str) -> dict[str, int]:
    """How a server is reached so that one which is gone is noticed, silent or not: within 14
    seconds, by default days.

    What the URL says itself is left as it is.
    """
    try:
        kind, _, driver = sqlalchemy.make_url(url).drivername.partition("+")
    except ArgumentError:
        return {}
    ours = {"connect_timeout": CONNECT_SECONDS} if kind in ("postgresql", "mysql") else {}
    if kind == "postgresql" and driver in ("", "psycopg", "psycopg2"):
        ours |= {"keepalives": 1, **NOTICED}
    return {
        name: value for name, value in ours.items() if name not in sqlalchemy.make_url(url).query
    }


def copy_first(file: Path, revision: str) -> Path:
    """A whole copy of an SQLite database beside it; its path."""
    copy = file.with_name(f"{file.name}.before-{revision}")
    number = 1
    while copy.exists():
        number += 1
        copy = file.with_name(f"{file.name}.before-{revision}-{number}")
    restore(file, copy)
    return copy


def restore(source: Path, target: Path) -> None:
    """Let one SQLite database hold what another does, also while others read it."""
    try:
        with (
            closing(sqlite3.connect(source, timeout=60)) as one,
            closing(sqlite3.connect(target, timeout=60)) as other,
        ):
            one.backup(other)
    except sqlite3.Error as error:
        raise StoreError(f"{source} cannot be copied to {target}: {error}") from None


def _script(path: Path) -> re.Match[str] | None:
    """A migration script's own revision and the one it leads on from."""
    pattern = (
        r"""^revision = ["'](?P<revision>[^"']+)["'].*?"""
        r"""^down_revision = (?:["'](?P<down>[^"']+)["']|None)"""
    )
    return re.search(pattern, path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def _read(url: str, library: Library) -> tuple[str, str]:
    """A database's revision, and which release set it up, if it says so."""
    file = sqlite_file(url)
    if file and (not file.exists() or file.stat().st_size == 0):
        return "", ""
    shown = f"{library.option} {without_credentials(url)}"
    try:
        engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.NullPool, connect_args=reaching(url)
        )
        with engine.connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if tables - {"alembic_version", "kdexp_claims"} and library.table not in tables:
                raise StoreError(
                    f"{shown}: is not {library.name}'s database (its tables are"
                    f" {', '.join(sorted(tables)[:3])}, …): name another with {library.option}."
                )
            if "alembic_version" not in tables:
                return "", ""
            found = connection.execute(
                sqlalchemy.text("select version_num from alembic_version")
            ).scalar()
            release = None
            if "version_info" in tables:
                release = connection.execute(
                    sqlalchemy.text("select library_version from version_info")
                ).scalar()
            return str(found or ""), f", set up by {library.name} {release}" if release else ""
    except (ImportError, NoSuchModuleError) as error:
        raise StoreError(
            f"{shown}: needs a driver that is not installed ({_first(error)}); {_driver(url)}"
        ) from None
    except ArgumentError:
        raise StoreError(
            f"{shown}: is no database's URL; write it as postgresql://HOST/DB or sqlite:///FILE"
        ) from None
    except (SQLAlchemyError, ValueError, UnicodeError) as error:
        advice = (
            f"correct {library.option}, or start the database"
            if file is None
            else f"correct {library.option}, or restore it"
        )
        raise StoreError(
            f"{library.name}'s database {without_credentials(url)}: {_first(error)}; {advice}"
        ) from None


def _driver(url: str) -> str:
    if url.startswith("postgresql"):
        return "pip install 'kdexp[postgresql]'"
    if url.startswith("mysql"):
        return "pip install pymysql, and write mysql+pymysql://…"
    return "install one for this kind of database"


def _first(error: Exception) -> str:
    text = str(getattr(error, "orig", None) or error)
    return without_credentials(
        next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    )
