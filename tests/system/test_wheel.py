"""From the wheel alone, in a folder outside of the checkout: the first ten minutes, with what comes
with kdexp and with somebody's own images.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from system.conftest import environment

pytestmark = pytest.mark.slow
QUICK = ["--set", "study.repeats=1", "--set", "training.epochs=4", "--set", "teacher.epochs=4"]
CLASSES = {"Äpfel": 60, "red roses": 45, "grey sky": 40, "stripes": 36, "dots": 30, "checks": 24}
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds, and nothing else of the checkout."""
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in map(Path, files.stdout.splitlines()):
        if (ROOT / name).is_file() and name.parts[0] in ("kdexp", name.name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(source / "dist")],
        cwd=source,
        capture_output=True,
        check=True,
    )
    (wheel,) = (source / "dist").glob("kdexp-*.whl")
    place = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(place)
    return place


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """kdexp out of the wheel, in a folder of its own."""
    where = environment() | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def kdexp(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "kdexp", *arguments],
            cwd=tmp_path,
            env=where,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr + done.stdout
        return done

    said = subprocess.run(
        [sys.executable, "-c", "import kdexp; print(kdexp.__file__)"],
        cwd=tmp_path, env=where, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(said.stdout.strip()).is_relative_to(installed), "not the checkout's"
    return kdexp


def test_the_first_ten_minutes_with_what_comes_with_kdexp(run: Run, tmp_path: Path) -> None:
    run("init", "digits")
    assert "training" in run("check", "digits.yaml", *QUICK).stdout
    assert not (tmp_path / "mlruns").exists()
    run("sweep", "digits.yaml", "--trials", "4", *QUICK, "--set", "selection.accuracy_bar=0.3")
    selected = json.loads(run("select", "digits", "--json").stdout)
    digits = load_digits()
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(digits.images[:20]):
        pixels = np.rint(image * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    run("predict", selected["run_id"], "photos", "--out", "answers.csv")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert len(rows) == 20
    assert {row["label"] for row in rows} <= set("0123456789")
    forms = json.loads(run("benchmark", "models:/digits@smallest", "--json").stdout)["forms"]
    assert forms[0]["val_accuracy"] == pytest.approx(selected["val_accuracy"])
    run("report", "digits", "--output", "report.html")
    assert f"{selected['parameters']:,} parameters" in (tmp_path / "report.html").read_text("utf-8")
    listed = json.loads(run("list", "digits", "--json").stdout)
    assert len(listed) == 4
    run("reproduce", selected["run_id"])


def picture(name: str, number: int, random: np.random.Generator) -> Image.Image:
    """One of a class, of an odd size, in colour or grey."""
    size = int(random.integers(23, 61)), int(random.integers(23, 61))
    rows, columns = np.mgrid[: size[1], : size[0]]
    noise = random.integers(0, 60, (size[1], size[0], 3))
    base = {
        "Äpfel": [60, 190, 60] * np.ones_like(noise),
        "red roses": [190, 30, 50] * np.ones_like(noise),
        "grey sky": 150 * np.ones_like(noise),
        "stripes": np.repeat((rows // 4 % 2 * 190)[..., None], 3, 2),
        "dots": np.repeat(((rows % 9 < 3) & (columns % 9 < 3))[..., None] * 190, 3, 2),
        "checks": np.repeat(((rows // 8 + columns // 8) % 2 * 190)[..., None], 3, 2),
    }[name]
    image = Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))
    return image.convert("L") if name == "grey sky" and number % 2 else image


def test_somebodys_folder_ends_in_answers_by_class_name(run: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    root = tmp_path / "meine Bilder"
    for name, count in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            suffix = (".jpg", ".png", ".webp")[number % 3]
            picture(name, number, random).save(root / name / f"schön {number}{suffix}")
    (root / "dots" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    run("init", "meine Bilder", "--output", "own.yaml")
    failed = run("sweep", "own.yaml", code=1)
    assert "broken.jpg" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    (root / "dots" / "broken.jpg").unlink()
    few = ["--trials", "4", "--set", "study.repeats=1", "--set", "selection.accuracy_bar=0.5"]
    run("sweep", "own.yaml", *few)
    (study,) = json.loads(run("list", "--json").stdout)
    assert study["selected_test_accuracy"] > 0.5
    fresh = tmp_path / "new"
    fresh.mkdir()
    for name in CLASSES:
        picture(name, 0, random).save(fresh / f"{name}.png")
    answered = run("predict", study["selected_run"], "new", "--out", "answers.csv").stdout
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert len(rows) == len(CLASSES)
    assert {row["label"] for row in rows} <= CLASSES.keys()
    right = sum(Path(row["path"]).stem == row["label"] for row in rows)
    assert right >= 4
    assert "Äpfel" in answered
