"""The documentation says what is true: every key, every command, every variable, and the two
commands first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from kdexp.cli import app
from kdexp.config import Sweep, flatten, load

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
README = (ROOT / "README.md").read_text()


def annotated() -> str:
    (block,) = [
        block
        for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
        if block.startswith("name:")
    ]
    return block


def test_the_annotated_sweep_file_is_valid_and_shows_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(annotated())
    defaults = Sweep(name="x")
    sweep = load(path)
    assert sweep.recipe == defaults.recipe
    assert (sweep.study, sweep.selection) == (defaults.study, defaults.selection)


def test_the_annotated_sweep_file_names_every_key() -> None:
    written = yaml.safe_load(annotated())
    # "and every key of training"
    shared = {f"teacher.{key}" for key in flatten(Sweep(name="x").training)}
    missing = []
    for path in flatten(Sweep(name="x")):
        node = written
        for step in path.split("."):
            node = node.get(step, missing) if isinstance(node, dict) else missing
        if node is missing and path not in shared:
            missing.append(path)
    assert not missing


COMMANDS = typer.main.get_command(app).commands


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 18


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_stands_in_the_guide(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert f"`kdexp {name}" in GUIDE
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert parameter.help, f"--{parameter.name} of {name} has no help"
            assert parameter.opts[0] in GUIDE, f"{parameter.opts[0]} is not in the guide"
            if parameter.envvar:
                assert str(parameter.envvar) in GUIDE


PYTHON = [
    block
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    if "import kdexp" in block
]
NOTEBOOK = json.loads((ROOT / "docs" / "study.ipynb").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["guide", "notebook"])
def test_what_is_shown_in_python_runs(what: str, tmp_path: Path) -> None:
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(PYTHON) == 1
    assert len(cells) > 5
    (tmp_path / "digits.yaml").write_text((ROOT / "sweeps" / "digits.yaml").read_text())
    if what == "notebook":
        (tmp_path / "digits.yaml").unlink()  # its first cell makes it
    script = "\n".join(PYTHON if what == "guide" else cells)
    few = '"study.trials": 5, "training.epochs": 3, "teacher.epochs": 3'
    assert '"study.trials": 12' in script
    script = script.replace('"study.trials": 12', few)  # as it stands it takes minutes
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert what == "notebook" or "frontier" not in done.stdout


@pytest.mark.parametrize("name", ["commands", "keys"])
def test_the_references_are_what_the_program_says(name: str) -> None:
    spec = importlib.util.spec_from_file_location("references", ROOT / "docs" / "references.py")
    references = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(references)
    written = (ROOT / "docs" / f"{name}.md").read_text()
    assert getattr(references, name)() == written, "python docs/references.py writes them anew"
    assert all(
        path in written for path in flatten(Sweep(name="x")) if name == "keys" and "." in path
    )


def test_the_two_commands_stand_on_the_readmes_first_screen() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "make sweep" in first
    assert "make test" in first


def test_no_placeholder_is_left() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 3
    assert not [document for document in documents if "@@" in document.read_text()]


@pytest.mark.parametrize(
    "document", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
)
def test_every_link_and_sweep_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for name in re.findall(r"sweeps/[\w.-]+\.yaml", text):
        assert (ROOT / name).exists(), name


def test_the_constraints_hold_versions_only_and_a_matching_pair() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(lines) > 100
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line) for line in lines)
    pinned = dict(line.split("==") for line in lines)
    torch, vision = (
        tuple(map(int, pinned[name].split(".")[:2])) for name in ("torch", "torchvision")
    )
    assert vision == (0, torch[1] + 15), "torchvision 0.(n+15) belongs to torch 2.n"
