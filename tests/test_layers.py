"""The layers of the package: imports point down, the core knows no shell, and the help is instant."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kdexp"
LAYERS = {
    "kdexp": 0,
    "kdexp.files": 0,
    "kdexp.urls": 0,
    "kdexp.embedded": 0,
    "kdexp.schema": 1,
    "kdexp.intervals": 0,
    "kdexp.reading": 0,
    "kdexp.surroundings": 0,
    "kdexp.own": 1,
    "kdexp.workers": 1,
    "kdexp.claims": 2,
    "kdexp.config": 1,
    "kdexp.settings": 1,
    "kdexp.environment": 2,
    "kdexp.imported": 0,
    "kdexp.selection": 2,
    "kdexp.objective": 2,
    "kdexp.stopping": 3,
    "kdexp.plots": 3,
    "kdexp.distill": 2,
    "kdexp.distill.images": -1,
    "kdexp.distill.folders": 0,
    "kdexp.distill.inspection": 1,
    "kdexp.distill.data": 2,
    "kdexp.distill.models": 3,
    "kdexp.distill.plain": 2,
    "kdexp.distill.compact": 3,
    "kdexp.distill.deploy": 4,
    "kdexp.distill.losses": 2,
    "kdexp.distill.evaluate": 3,
    "kdexp.distill.randomness": 2,
    "kdexp.distill.optimizers": 2,
    "kdexp.distill.stacked": 4,
    "kdexp.distill.guard": 5,
    "kdexp.distill.packs": 5,
    "kdexp.distill.train": 6,
    "kdexp.distill.checkpoints": 7,
    "kdexp.distill.execution": 7,
    "kdexp.distill.teacher": 8,
    "kdexp.distill.weights": 2,
    "kdexp.tracking": 4,
    "kdexp.bench": 5,
    "kdexp.patience": 0,
    "kdexp.outcome": 8,
    "kdexp.describe": 9,
    "kdexp.work": 9,
    "kdexp.pool": 10,
    "kdexp.preload": 11,
    "kdexp.runs": 11,
    "kdexp.prepare": 12,
    "kdexp.study": 9,
    "kdexp.scheduler": 12,
    "kdexp.remembered": 10,
    "kdexp.sweep": 13,
    "kdexp.records": 5,
    "kdexp.variants": 6,
    "kdexp.verify": 7,
    "kdexp.compare": 8,
    "kdexp.promote": 9,
    "kdexp.export": 9,
    "kdexp.reproduce": 13,
    "kdexp.fresh": 13,
    "kdexp.confirm": 14,
    "kdexp.ui": 9,
    "kdexp.doctor": 10,
    "kdexp.screen": 15,
    "kdexp.cli": 16,
    "kdexp.__main__": 17,
}
SHELL_LIBRARIES = {"mlflow", "optuna", "typer", "click", "rich", "matplotlib"}
OWNERS = {
    "mlflow": {"kdexp.tracking"},
    "optuna": {"kdexp.study"},
    "onnx": {"kdexp.distill.deploy"},
    "onnxruntime": {"kdexp.distill.deploy"},
}


def modules() -> dict[str, Path]:
    files = list(PACKAGE.rglob("*.py"))
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    assert len(names) == len(LAYERS), "a module is missing from LAYERS, or LAYERS names one that is gone"
    return names


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_imports_point_down_only(name: str) -> None:
    ours = imported(modules()[name]) & LAYERS.keys()
    upward = [other for other in ours if other != "kdexp" and LAYERS[other] >= LAYERS[name]]
    assert not upward


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_one_library_lives_in_one_file(library: str) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imported(path))}
    assert users == OWNERS[library]


def test_distill_and_tracking_never_see_each_other() -> None:
    assert not any(i.startswith("kdexp.distill") for i in imported(modules()["kdexp.tracking"]))


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_core_imports_no_shell_library() -> None:
    core = "import kdexp.distill.teacher, kdexp.distill.train"
    assert not loaded_after(core) & SHELL_LIBRARIES
    assert loaded_after(f"{core}, optuna") & SHELL_LIBRARIES, "this test must be able to fail"


def test_a_worker_knows_no_server_and_no_study() -> None:
    forbidden = {"mlflow", "optuna", "sqlalchemy"}
    assert not loaded_after("import kdexp.work, kdexp.pool, kdexp.preload") & forbidden
    assert loaded_after("import kdexp.pool, kdexp.tracking") & forbidden, "this test must be able to fail"


def test_kdexp_and_its_command_line_import_nothing_heavy() -> None:
    assert not loaded_after("import kdexp, kdexp.cli") & {"torch", "mlflow", "optuna", "pydantic", "sklearn", "matplotlib"}


def test_help_takes_under_half_a_second() -> None:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kdexp", "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    assert any(once() < 0.5 for _ in range(10))  # the best of ten: a busy machine is not what is tested
