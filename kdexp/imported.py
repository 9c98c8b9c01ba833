"""What a module of the user's own imports, of what is the user's own: what its result depends on
besides libraries.

Read from the source, and from what the module holds once it is loaded: nothing is imported for it.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

__all__ = ["own_modules"]

LIBRARIES = ("site-packages", "dist-packages")


def own_modules(name: str, file: Path | None = None) -> dict[str, Path]:
    """The files of this module and of all that it imports, directly or not, by name; libraries and
    kdexp itself left out.

    `file` where the module's is known: one that was loaded by its path need not be what Python
    finds by its name.
    """
    found: dict[str, Path] = {}
    waiting, first = [name], {name: file}
    while waiting:
        name = waiting.pop()
        file = first.get(name) or _own_file(name)
        if name not in found and file:
            found[name] = file
            waiting += {*_parents(name), *_written(name, file), *_held(sys.modules.get(name))}
    return found


def _own_file(name: str) -> Path | None:
    """The source of a module of the user's own; None for libraries, and for names that are no
    modules.
    """
    top, spec = _spec(name.partition(".")[0]), None
    if top and not any(
        _library(Path(place))
        for place in [top.origin, *(top.submodule_search_locations or ())]
        if place
    ):
        # of a library nothing is asked: to find a module in it, Python would import it
        spec = _spec(name)
    file = Path(spec.origin).resolve() if spec and spec.has_location and spec.origin else None
    return file if file and file.is_file() else None


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is, without importing it or what is above it."""
    package, _, _ = name.rpartition(".")
    try:
        if found := getattr(sys.modules.get(name), "__spec__", None):
            return found
        above = _spec(package) if package else None
        if package and not (above and above.submodule_search_locations):
            return None  # a name in a module, and no module itself
        return PathFinder.find_spec(name, above.submodule_search_locations if above else None)
    except (ImportError, AttributeError, ValueError, TypeError):
        return None


def _library(file: Path) -> bool:
    file = file.resolve()
    homes = {
        Path(sysconfig.get_path(kind)).resolve()
        for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    ours = Path(__file__).resolve().parent
    return any(part in LIBRARIES for part in file.parts) or any(
        home in (file, *file.parents) for home in (*homes, ours)
    )


def _parents(name: str) -> Iterator[str]:
    """The packages around a module: they are loaded before it."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _written(name: str, file: Path) -> Iterator[str]:
    """What the source says is imported, at its top or anywhere in it."""
    tree = ast.Module([], [])
    with suppress(OSError, SyntaxError, ValueError):
        tree = ast.parse(file.read_text("utf-8"))
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join(filter(None, [*above, node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # it may be a module too


def _held(module: ModuleType | None) -> Iterator[str]:
    """The modules that a loaded one holds, and those that made what it holds: however they were
    imported.
    """
    for value in list(vars(module).values()) if module else ():
        name = (
            value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        )
        if isinstance(name, str):
            yield name
