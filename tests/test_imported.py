"""Which modules a network of one's own depends on: all of one's own that it imports, however it
imports them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdexp.config import Recipe
from kdexp.environment import record
from kdexp.imported import own_modules

FILES = {
    "mynets/__init__.py": "",
    "mynets/students.py": (
        """
import torch
from torch import nn
from . import blocks
from .parts.heads import head
import plain_helper

def mlp(channels, image_size, classes, width=8):
    from late_helper import width_of
    return head(classes)
"""
    ),
    "mynets/blocks.py": "from mynets.parts import WIDTH",
    "mynets/parts/__init__.py": "WIDTH = 3",
    "mynets/parts/heads.py": (
        """
import importlib
quiet = importlib.import_module("quiet_helper")

def head(classes):
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""
    ),
    "plain_helper.py": "import json, plain_helper",  # in a circle
    "late_helper.py": "def width_of(): return 3",
    "quiet_helper.py": "",
    "unrelated.py": "",
}
TOPS = {path.split("/")[0].removesuffix(".py") for path in FILES}
IMPORTED = {
    *("mynets", "mynets.students", "mynets.blocks", "mynets.parts", "mynets.parts.heads"),
    *("plain_helper", "late_helper", "quiet_helper"),
}


@pytest.fixture
def written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], None]]:
    """The user's modules in the folder where kdexp is run; writes one anew, to be imported anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        forget()

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in TOPS]:
            del sys.modules[name]
        importlib.invalidate_caches()

    for name, text in FILES.items():
        write(name, text)
    yield write
    forget()


def test_all_of_ones_own_that_a_network_imports_is_found_and_no_library(
    written, tmp_path: Path
) -> None:
    importlib.import_module("mynets.students")
    found = own_modules("mynets.students")
    assert found.keys() == IMPORTED
    assert all(tmp_path in file.parents for file in found.values())


def test_it_is_the_same_before_and_after_a_late_import(written) -> None:
    students = importlib.import_module("mynets.students")
    before = own_modules("mynets.students")
    assert "late_helper" not in sys.modules
    students.mlp(1, (8, 8), 10)
    assert own_modules("mynets.students") == before


def test_the_record_names_each_and_a_change_of_any_changes_it(written) -> None:
    recipe = Recipe.model_validate_json('{"student": {"architecture": "mynets.students:mlp"}}')

    def recorded() -> dict[str, str]:
        importlib.import_module("mynets.students")
        return {
            name: value
            for name, value in record("cpu", recipe, 1).items()
            if name.startswith("student ")
        }

    before = recorded()
    assert before.keys() == {
        "student source",
        *(f"student imports {name}" for name in IMPORTED - {"mynets.students"}),
    }
    assert recorded() == before
    for name, text in FILES.items():
        written(name, f"{text}\n# changed\n")
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        key = "student source" if module == "mynets.students" else f"student imports {module}"
        changed = {key for key, value in recorded().items() if before.get(key) != value}
        assert changed == (set() if module == "unrelated" else {key})
        written(name, text)


def test_a_network_of_a_library_is_recorded_by_the_librarys_version() -> None:
    assert own_modules("torch.nn") == {}
    assert own_modules("kdexp.distill.models") == {}
    assert own_modules("no_such_module") == {}
