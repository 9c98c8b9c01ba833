"""What a shell completes: studies and runs of the embedded store, keys of a sweep file.

Quick, and silent whatever happens: nothing heavy is imported, nothing is made, and where there is
no store, or a broken one, there is nothing to complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import typer

__all__ = ["runs", "set_keys", "studies"]

Found = list[tuple[str, str]]
SCHEMA = Path(__file__).parent / "sweeps" / "sweep.schema.json"
NOT_SET = ("search",)
"""Sections whose keys are not known beforehand."""


def _silent(complete: Callable[[Path, str], Found]) -> Callable[[typer.Context, str], Found]:
    """What a shell asks for; nothing where that cannot be said."""

    @wraps(complete)
    def asked(ctx: typer.Context, incomplete: str) -> Found:
        try:
            found = complete(_stores(ctx), incomplete)
        except Exception:
            return []
        return [(word, help) for word, help in found if word.startswith(incomplete)]

    # typer passes what the annotations ask for
    asked.__annotations__ = {"ctx": typer.Context, "incomplete": str}
    del asked.__wrapped__
    return asked


@_silent
def studies(stores: Path, incomplete: str) -> Found:
    """Names of studies, the latest first."""
    from kdexp.runs.embedded import study_names

    return [(name, "") for name in study_names(stores)]


@_silent
def runs(stores: Path, incomplete: str) -> Found:
    """IDs of runs, the latest first, with the runs' names."""
    from kdexp.runs.embedded import run_ids

    return run_ids(stores, incomplete)


@_silent
def set_keys(stores: Path, incomplete: str) -> Found:
    """Keys of a sweep file, each up to its value."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    return [(f"{key}=", said) for key, said in _keys(schema, schema, "")]


def _keys(node: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[Any]:
    for name, found in node.get("properties", {}).items():
        if not prefix and name in NOT_SET:
            continue
        section = schema["$defs"].get(str(found.get("$ref", "")).rpartition("/")[2])
        if section:
            yield from _keys(section, schema, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", found.get("description", "")


def _stores(ctx: typer.Context) -> Path:
    """The folder of the embedded stores, as the command line has it so far."""
    given = ctx.params.get("stores") or os.environ.get("KDEXP_STORES") or "mlruns"
    return Path(given).expanduser()
