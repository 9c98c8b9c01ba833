"""The documentation says what is true: every key, every command, every variable, and the two
commands first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from kdexp.cli import app
from kdexp.config import Data, Distillation, Student, Sweep, Training, flatten, load
from kdexp.distill.datasets import load_splits
from kdexp.distill.packs import Lane
from kdexp.distill.train import train

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


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def commands_in(text: str) -> list[list[str]]:
    """What a document shows to be typed: its indented lines that begin with kdexp."""
    lines = [line.strip() for line in re.findall(r"^    kdexp .*$", text, re.MULTILINE)]
    shown = [re.sub(r"\s{2,}.*", "", line) for line in lines]  # what stands beside it explains it
    return [shlex.split(line, comments=True)[1:] for line in shown if "…" not in line]


SHOWN = [command for document in DOCUMENTS for command in commands_in(document.read_text())]


def test_documents_show_commands() -> None:
    assert len(SHOWN) >= 15, SHOWN


@pytest.mark.parametrize("shown", SHOWN, ids=" ".join)
def test_every_command_that_a_document_shows_is_one(shown: list[str]) -> None:
    name, *arguments = shown
    COMMANDS[name].make_context(name, arguments)


def test_a_command_that_is_none_is_noticed() -> None:
    for line in ("    kdexp sweep x.yaml --epochs 3", "    kdexp select"):
        ((name, *arguments),) = commands_in(line)
        with pytest.raises(Exception, match=r"No such option|Missing parameter"):
            COMMANDS[name].make_context(name, arguments)


YAML = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.split()[0].strip(":{"))
def test_every_piece_of_a_sweep_file_is_valid(block: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETWORK)
    (tmp_path / "x.yaml").write_text(block if block.startswith("name:") else f"name: x\n{block}")
    load(tmp_path / "x.yaml")


(NETWORK,) = [b for b in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "def mlp" in b]


def test_the_network_of_the_guide_trains(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "guide_nets.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Sweep(
        name="x",
        data=Data(dataset="digits", channels=1),
        student=Student(architecture="guide_nets:mlp", options={"width": 64}),
        training=Training(epochs=6, learning_rate=0.01),
        distillation=Distillation(alpha=0.0),
    ).recipe
    splits = load_splits(recipe.data)
    reports = list(train([Lane.of(recipe)], splits, recipe.data))
    assert reports[-1][0].val_accuracy > 0.85


def test_the_two_commands_stand_on_the_readmes_first_screen() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "make sweep" in first
    assert "make test" in first


def test_no_placeholder_is_left() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 3
    assert not [document for document in documents if "@@" in document.read_text()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
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
