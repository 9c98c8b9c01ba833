"""Image folders as people have them, by the command line: what was read is said, or what is wrong,
before any training.

Every rule for a file is in tests/test_images.py, every layout in tests/test_folders.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from system.conftest import runs, trials

from cases.conftest import OWN_DATA, Case, one_line


def test_what_was_read_is_said_once_before_training(case: Case) -> None:
    case.own()
    shots = case.pictures(count=6)
    for file in list(shots.rglob("*.png")):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")
    (shots / ".DS_Store").touch()
    (shots / "digit 1" / "Thumbs.db").touch()
    (shots / "digit 1" / "labels.txt").touch()
    (shots / "digit 7" / "003.png").rename(shots / "digit 7" / "003.jfif")
    done = case.kd("train", "own.yaml")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert (
        lines[0]
        == "images    18 images (12 training, 3 validation, 3 test), 3 classes, 21 left out: 20"
        " hidden, 1 .txt"
    )
    assert sum(line.startswith("images ") for line in lines) == 1


def test_sixteen_bits_and_transparency_are_said(case: Case) -> None:
    case.own()
    for file in case.pictures(count=6).rglob("*.png"):
        ink = np.asarray(Image.open(file))
        if "digit 0" in str(file):
            Image.fromarray(20_000 + ink.astype(np.uint16) * 178).save(file)
        else:
            Image.fromarray(np.dstack([np.zeros_like(ink), ink])).save(file)
    done = case.kd("teacher", "own.yaml")
    assert "          12 laid over white where transparent\n" in done.stdout
    assert "          6 of 16 bits: scaled to 8 (value / 257)\n" in done.stdout


@pytest.mark.parametrize("command", ["sweep", "train", "teacher"])
def test_a_broken_image_ends_the_command_before_any_training(case: Case, command: str) -> None:
    case.own()
    case.pictures("data/shots/train")
    (case.pictures("data/shots/test", 6) / "digit 7" / "003.png").write_bytes(os.urandom(100))
    one_line(
        case.kd(command, "own.yaml"),
        "data/shots/test/digit 7/003.png (test split)",
        "no image that can be read",
    )
    assert not runs(case.folder, "teacher")


def test_a_jpeg_cut_short_and_a_huge_image_are_named(case: Case) -> None:
    case.own()
    shots = case.pictures(count=6, suffix="jpg")
    file = shots / "digit 7" / "003.jpg"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    one_line(case.kd("train", "own.yaml"), "digit 7/003.jpg", "truncated")
    file.unlink()
    Image.new("1", (14200, 14200)).save(shots / "digit 1" / "scan.png")
    one_line(
        case.kd("train", "own.yaml"),
        "digit 1/scan.png",
        "201,640,000 pixels, 178,956,970 are allowed",
    )


def test_an_empty_class_in_test_ends_a_sweep_before_any_training(case: Case) -> None:
    case.own()
    case.pictures("data/shots/train")
    for file in (case.pictures("data/shots/test", 6) / "digit 1").iterdir():
        file.unlink()
    one_line(
        case.kd("sweep", "own.yaml"), "class 'digit 1' has no images in data/shots/test", "needs 1"
    )
    assert not runs(case.folder, "teacher")


def test_images_that_changed_since_a_study_began_are_told_by_name_before_another_teacher_is_trained(
    case: Case,
) -> None:
    case.own()
    shots = case.pictures()
    nobody = "--set", "selection.accuracy_bar=1.0"  # registering a model takes seconds
    more = "sweep", "own.yaml", *nobody, "--trials", "4"
    one_line(case.kd("sweep", "own.yaml", *nobody), "No student")
    file, other, new = (
        shots / name for name in ("digit 1/000.png", "digit 1/zzz.png", "digit 7/new.png")
    )
    file.rename(other)
    assert "teacher" not in one_line(
        case.kd(*more), "1 renamed (digit 1/000.png → digit 1/zzz.png)", "own-2"
    )
    other.rename(file)
    Image.new("L", (9, 9), 77).save(new)
    one_line(case.kd(*more), "began with other images", "1 added (digit 7/new.png)")
    new.unlink()
    content = file.read_bytes()  # a test image, of which training and validation know nothing
    Image.new("L", (9, 9), 77).save(file)
    one_line(case.kd(*more), "1 with other pixels (digit 1/000.png)")
    file.write_bytes(content)
    for manifest in case.folder.rglob("images.json"):  # as in a study of an earlier version
        manifest.unlink()
    file.unlink()
    one_line(case.kd(*more), "began with other images", "not on record")
    file.write_bytes(content)
    one_line(case.kd(*more), "No student")
    assert sum(trials(case.folder).values()) == 4
    assert sum(runs(case.folder, "teacher").values()) == 1


def test_odd_names_of_classes_and_folders_go_through_a_whole_study_and_travel_with_its_model(
    case: Case,
) -> None:
    root = "data/my shots/C# 100% [1] 知識?"
    names = ['-it\'s "one"', "caf\\xe9", "Äpfel & Birnen 🍐"]
    for part, count in (("Train", 12), ("Test", 4)):
        shots = case.pictures(f"{root}/{part}", count)
        for old, new in zip(
            ("digit 0", "digit 1", "digit 7"),
            (os.fsencode(names[2]), os.fsencode(names[0]), b"caf\xe9"),
        ):
            os.rename(os.fsencode(shots / old), os.path.join(os.fsencode(shots), new))  # noqa: PTH104, PTH118
    case.own(data=re.sub("path: [^,]*", f'path: "{root.removeprefix("data/")}"', OWN_DATA))
    done = case.kd("sweep", "own.yaml")
    assert done.returncode == 0, done.stderr
    assert "images    48 images (30 training, 6 validation, 12 test), 3 classes\n" in done.stdout
    assert re.search(
        "^          [0-9]+ test images are among the training images too", done.stdout, flags=re.M
    )
    assert "12 images, looked at once" in done.stdout
    (run_id,) = re.findall("^Run ID: +([0-9a-f]+)", done.stdout, flags=re.M)
    assert "identical" in case.kd("reproduce", run_id).stdout
    mlflow.set_tracking_uri("sqlite:///mlruns/mlflow.db")
    assert mlflow.models.get_model_info("models:/own@smallest").metadata["classes"] == sorted(names)


def test_one_folder_too_deep_says_what_to_pass(case: Case) -> None:
    case.own()
    case.pictures("data/shots/flowers", 6)
    one_line(
        case.kd("train", "own.yaml"), "only one class (flowers)", "--set data.path=shots/flowers"
    )
    assert case.kd("teacher", "own.yaml", "--set", "data.path=shots/flowers").returncode == 0


def test_a_broken_link_and_a_loop(case: Case, tmp_path: Path) -> None:
    case.own()
    shots = case.pictures(count=6)
    (shots / "digit 0" / "loop").symlink_to("..")
    assert (
        "18 images (12 training, 3 validation, 3 test), 3 classes, 1 left out: 1 a link back"
        in case.kd("teacher", "own.yaml").stdout
    )
    (shots / "digit 0" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    one_line(case.kd("teacher", "own.yaml"), "digit 0/gone.png", "No such file")
