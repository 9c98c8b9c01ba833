"""A sweep file to begin with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from kdexp import KdexpError
from kdexp.cli import app
from kdexp.config import Sweep, load, name_for
from kdexp.distill.datasets import load_splits
from kdexp.init import SHIPPED, begin, shipped
from kdexp.selection import check_reachable, plan_of

SCHEMA = json.loads((SHIPPED / "sweep.schema.json").read_text())


def pictures(root: Path, classes: dict[str, int], mode: str = "RGB", size: int = 40) -> Path:
    """A folder of images of noise, so many of each class."""
    noise = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            shape = (size, size + 3) if mode == "L" else (size, size + 3, 3)
            pixels = noise.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("name", shipped())
def test_what_comes_with_kdexp_is_written_as_it_is(name: str, tmp_path: Path) -> None:
    begun = begin(name, tmp_path / "mine.yaml")
    original = {"fashion-mnist": "fashion-mnist-quick"}.get(name, name)
    assert load(begun.file) == load(SHIPPED / f"{original}.yaml")
    assert f"kdexp sweep {begun.file}" in begun.file.read_text()
    assert json.loads(begun.schema.read_text()) == SCHEMA


def test_a_folder_is_looked_at(tmp_path: Path) -> None:
    root = pictures(tmp_path / "Größe & {Art}", {"Äpfel": 90, "it's": 60, "no": 20})
    begun = begin(str(root), tmp_path / "own.yaml")
    sweep = load(begun.file)
    assert (sweep.data.image_size, sweep.data.channels) == (32, 3)
    splits = load_splits(sweep.data)
    assert set(splits.train.classes) == {"no", "it's", "Äpfel"}
    plan = plan_of(sweep.study, sweep.selection, splits.folds)
    check_reachable(plan, len(splits.validation))
    said = "\n".join(begun.said)
    assert "170 training images of 3 classes" in said
    assert "the smallest class is no, 20 images: too few" in said


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("photos", "photos"),
        ("-a/b: “c” ", "a-b-c"),
        ("x" * 130, "x" * 100),
        (f"{'x' * 99}  y", "x" * 99),
        ("v1.2+", "v1.2+"),
        ("…", "otherwise"),
        ("++", "otherwise"),
        ("Größe", "Größe"),
    ],
)
def test_any_text_becomes_a_name_that_is_allowed(text: str, name: str) -> None:
    assert name_for(text, "otherwise") == name
    assert Sweep(name=name).name == name


def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    root = pictures(tmp_path / ("x" * 120), {"a": 60, "b": 60})
    assert load(begin(str(root), tmp_path / "long.yaml").file).name == "x" * 100


def test_grey_images_are_trained_on_as_grey(tmp_path: Path) -> None:
    root = pictures(tmp_path / "grey", {"a": 60, "b": 60}, "L", 20)
    assert load(begin(str(root), tmp_path / "grey.yaml").file).data.channels == 1


def test_nothing_is_overwritten_and_what_is_none_is_named(tmp_path: Path) -> None:
    file = begin("digits", tmp_path / "one.yaml").file
    before = file.read_text()
    with pytest.raises(KdexpError, match="there is one already"):
        begin("digits", file)
    assert file.read_text() == before
    with pytest.raises(KdexpError, match="neither a folder of images nor one of digits"):
        begin("nothing", tmp_path / "two.yaml")


def test_the_schema_is_that_of_this_version() -> None:
    """kdexp schema > kdexp/sweeps/sweep.schema.json"""
    assert Sweep.model_json_schema() == SCHEMA


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_sweep_file_tells_editors_its_schema(file: Path) -> None:
    assert file.read_text().startswith("# yaml-language-server: $schema=sweep.schema.json\n")


def models_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= models_of(field.annotation)
    return found


def test_every_key_has_a_description() -> None:
    models = models_of(Sweep)
    assert len(models) > 7
    undescribed = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not undescribed


def test_every_help_ends_with_an_example() -> None:
    assert len(app.registered_commands) > 10
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert (command.epilog or "").startswith(f"Example: kdexp {name}"), name
