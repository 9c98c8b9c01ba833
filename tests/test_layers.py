"""The layers of the package: imports point down, the core knows no shell, and the help is
instant.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kdexp

PACKAGE = Path(__file__).parents[1] / "kdexp"
ROOMS = ("", "distill", "workers", "runs", "search", "select", "skin")
"""From the bottom up; "" is the package's own folder without what is shown to people."""
SKIN = {"__main__", "api", "as_json", "cli", "completion", "doctor", "init", "screen", "ui"}
SHELL_LIBRARIES = {"mlflow", "optuna", "typer", "click", "rich", "matplotlib"}
OWNERS = {
    "mlflow": {"kdexp.runs.tracking"},
    "optuna": {"kdexp.search.study", "kdexp.search.storage", "kdexp.search.learned"},
    "onnx": {"kdexp.distill.deploy"},
    "onnxruntime": {"kdexp.distill.deploy", "kdexp.runs.served"},  # where kdexp is not installed
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    assert len(found) > 60
    return found


def room(name: str) -> int:
    """Its level, from 0 at the bottom."""
    folder, _, last = name.removeprefix("kdexp").removeprefix(".").rpartition(".")
    return ROOMS.index("skin" if last in SKIN else folder)


def arrows() -> dict[str, set[str]]:
    """The modules that each module imports; a room's own name says nothing."""
    files = {name: path for name, path in modules().items() if path.name != "__init__.py"}
    return {name: imported(path) & (files.keys() - {name}) for name, path in files.items()}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_down_only() -> None:
    upward = {(a, b) for a, others in arrows().items() for b in others if room(b) > room(a)}
    assert not upward
    assert (
        room("kdexp.cli")
        > room("kdexp.search.study")
        > room("kdexp.distill.train")
        > room("kdexp.config")
    )


def test_imports_go_round_in_no_circle() -> None:
    TopologicalSorter(arrows()).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(arrows() | {"kdexp.config": {"kdexp.cli"}}).prepare()


def test_the_map_names_every_module() -> None:
    named = set(re.findall(r"[a-z_]+", kdexp.__doc__ or ""))
    assert not {name.rpartition(".")[2] for name in arrows()} - named - {"__main__"}


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_one_library_lives_in_one_file(library: str) -> None:
    users = {
        name
        for name, path in modules().items()
        if any(i.split(".")[0] == library for i in imported(path))
    }
    assert users == OWNERS[library]


def test_distill_and_tracking_never_see_each_other() -> None:
    assert not any(
        i.startswith("kdexp.distill") for i in imported(modules()["kdexp.runs.tracking"])
    )


def loaded_after(statement: str) -> set[str]:
    code = (
        f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    )
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_the_core_imports_no_shell_library() -> None:
    core = "import kdexp.distill.teacher, kdexp.distill.train"
    assert not loaded_after(core) & SHELL_LIBRARIES
    assert loaded_after(f"{core}, optuna") & SHELL_LIBRARIES, "this test must be able to fail"


def test_a_worker_knows_no_server_and_no_study() -> None:
    forbidden = {"mlflow", "optuna", "sqlalchemy"}
    assert (
        not loaded_after("import kdexp.workers.work, kdexp.workers.pool, kdexp.workers.preload")
        & forbidden
    )
    assert loaded_after("import kdexp.workers.pool, kdexp.runs.tracking") & forbidden, (
        "this test must be able to fail"
    )


def test_kdexp_and_its_command_line_import_nothing_heavy() -> None:
    assert not loaded_after("import kdexp, kdexp.cli") & {
        "torch",
        "mlflow",
        "optuna",
        "pydantic",
        "sklearn",
        "matplotlib",
    }


def test_help_takes_under_half_a_second() -> None:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kdexp", "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    # the best of ten: a busy machine is not what is tested
    assert any(once() < 0.5 for _ in range(10))
