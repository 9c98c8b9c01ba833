"""Networks of one's own, `place:callable`: the user's file is found, loaded, and named where it
fails.

A place is a module (`nets`, `pack.nets`), a file (`nets.py`, `my-nets.py`, `~/nets.py`,
`/a/path/nets.py`), with or without its ending. It is looked for in the working folder and in the
user's own folders on Python's path (the sweep file's is one of them), and goes before any module of
that name that Python or a library has: such a file is loaded under a name of its own, so that who
imports `code` or `test` still gets Python's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from kdexp.surroundings import expanded

__all__ = ["load_own", "own_file", "own_line"]

LIBRARIES = {Path(place) for name, place in sysconfig.get_paths().items() if "lib" in name}
PACKAGE = Path(__file__).resolve().parent


def load_own(name: str) -> Any:
    """What `place:callable` names. Raises whatever importing the user's file raises."""
    place, _, attribute = name.rpartition(":")
    file = own_file(place)
    module = (
        importlib.import_module(place)
        if file is None or _is_importable(place, file)
        else _loaded(file)
    )
    return getattr(module, attribute)


def own_file(place: str) -> Path | None:
    """The user's file that a place names; None where it is a library's module, or nothing."""
    if place.endswith(".py") or "/" in place:
        names = [expanded(place), expanded(place).with_suffix(".py")]
    else:
        inside = Path(*place.split("."))
        names = [Path(f"{inside}.py"), inside / "__init__.py", Path(f"{place}.py")]
    found = (folder / name for folder in _own_folders() for name in names)
    return next((file.resolve() for file in found if file.is_file()), None)


def own_line(error: BaseException) -> str:
    """The last line of the user's own that an error went through, such as 'nets.py, line 13:
    x.view(…)'; '' for none.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if (
            file.is_file()
            and not file.resolve().is_relative_to(PACKAGE)
            and not _is_a_librarys(file)
        ):
            return f"{file.name}, line {frame.lineno}: {frame.line}"
    return ""


def _own_folders() -> list[Path]:
    with suppress(OSError):  # the working folder is gone
        return [
            Path.cwd(),
            *(Path(entry) for entry in sys.path if entry and not _is_a_librarys(Path(entry))),
        ]
    return []


def _is_a_librarys(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(
        path.is_relative_to(each) for each in LIBRARIES
    )


def _is_importable(place: str, file: Path) -> bool:
    """Whether Python's import finds this very file."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place) or place.endswith(".py"):
        return False
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # its first part is another's module
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


def _loaded(file: Path) -> ModuleType:
    digest = hashlib.sha256(str(file).encode()).hexdigest()
    name = f"kdexp_own_{re.sub(r'[^a-zA-Z0-9]', '_', file.stem)}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # for what it imports from beside it
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
