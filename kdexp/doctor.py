"""What is installed, what the stores are for, and whether the two fit: read without changing
anything.

kdexp doctor [--upgrade]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from kdexp import KdexpError, __version__
from kdexp.runs.schema import Library, Schema, StoreError, copy_first, restore, schema_of
from kdexp.runs.tracking import MLFLOW
from kdexp.runs.tracking import upgrade as upgrade_mlflow
from kdexp.search.storage import OPTUNA
from kdexp.search.storage import upgrade as upgrade_optuna
from kdexp.settings import Settings
from kdexp.urls import sqlite_file, without_credentials

__all__ = ["examine"]

LIBRARIES = ("torch", "torchvision", "mlflow", "optuna")
Upgrade = Callable[[str], None]


def examine(settings: Settings, upgrade: bool, say: Callable[[str], None]) -> bool:
    """Say how things are, a line each, and take older databases along if told to; whether
    everything fits in the end.
    """
    say(f"kdexp {__version__}, " + ", ".join(f"{name} {_installed(name)}" for name in LIBRARIES))
    databases: list[tuple[Library, str, Upgrade]] = [(OPTUNA, settings.storage_url, upgrade_optuna)]
    if settings.tracking_url.startswith("http"):
        say(
            f"MLflow  {without_credentials(settings.tracking_url)}: a server, whose version is its"
            " own affair"
        )
    else:
        databases.insert(0, (MLFLOW, settings.tracking_url, upgrade_mlflow))
    fit = [
        _fits(library, url, take_along if upgrade else None, say)
        for library, url, take_along in databases
    ]
    return all(fit)


def _fits(library: Library, url: str, upgrade: Upgrade | None, say: Callable[[str], None]) -> bool:
    try:
        schema = schema_of(url, library)
        said = f"{library.name:<7} {without_credentials(url.partition('?')[0])}"
        if schema.age == "older" and upgrade:
            say(f"{said}: {_taken_along(schema, url, upgrade)}")
            return True
    except StoreError as error:
        say(str(error))
        return False
    say(f"{said}: {_verdict(schema)}")
    return schema.age in ("new", "fits")


def _verdict(schema: Schema) -> str:
    library = schema.library
    if schema.age == "new":
        return "is not there yet; the first command that records makes it"
    if schema.age == "fits":
        return f"fits (revision {schema.found})"
    how = (
        "kdexp doctor --upgrade copies it and takes it along"
        if schema.age == "older"
        else f"install the {library.name} that made it, or the newest; it cannot be taken back"
    )
    return f"is of {schema.maker} (revision {schema.found}, here {schema.wanted}): {how}"


def _taken_along(schema: Schema, url: str, upgrade: Upgrade) -> str:
    """Upgrade a database, its copy beside it; what was done. Where that fails it is put back.
    Raises StoreError.
    """
    file = sqlite_file(url)
    if file is None:
        raise StoreError(
            f"{schema.library.name}'s database {without_credentials(url)} is on a server, of which"
            f" kdexp makes no copy: back it up there, then run {_by_hand(schema.library)}."
        )
    if not os.access(file, os.W_OK):
        raise StoreError(
            f"{file}: cannot be written here; change its permissions, or copy the stores elsewhere"
            " (--stores)."
        )
    try:
        copy = copy_first(file, schema.found)
    except OSError as error:
        raise StoreError(
            f"{file}: cannot be copied ({error.strerror}), so it stays as it is."
        ) from None
    try:
        upgrade(url)
    except KdexpError as error:
        restore(copy, file)
        raise StoreError(f"{error} {file} is as it was (its copy: {copy}).") from error
    return f"taken along from {schema.found} to {schema.wanted}; as it was: {copy}"


def _by_hand(library: Library) -> str:
    return "mlflow db upgrade URL" if library is MLFLOW else "optuna storage upgrade --storage URL"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
