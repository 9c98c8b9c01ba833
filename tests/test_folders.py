"""A folder of images: what is an image, a class, a split; what is left out, refused, or said; and
in which order it is read.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from kdexp.config import Data
from kdexp.distill import inspection
from kdexp.distill.datasets import (
    DataError,
    Splits,
    _image_folder,
    folds_of,
    load_example,
    load_splits,
    load_test,
    stratified,
)
from kdexp.distill.folders import survey
from kdexp.distill.images import read
from kdexp.distill.inspection import changed

DATA = Data(dataset="image_folder", path="shots", image_size=8, channels=1, validation_fraction=0.2)


def picture(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7)).astype(np.uint8)).save(
        file
    )
    return file


def pictures(
    root: Path, classes: Iterable[str] = ("cat", "dog"), count: int = 6, first: int = 0
) -> Path:
    """Images of which no two are equal."""
    for label, name in enumerate(classes):
        for number in range(count):
            picture(root / name / f"{number}.png", first + 1000 * label + number)
    return root


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return tmp_path / "shots"


def loaded(shots: Path, **changes: object) -> Splits:
    return load_splits(DATA.model_copy(update=changes), shots.parent)


def refused(shots: Path, *words: str) -> str:
    with pytest.raises(DataError) as error:
        loaded(shots)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said
    return said


def said(splits: Splits) -> str:
    assert splits.inspection is not None
    return "\n".join([str(splits.inspection), *splits.inspection.notes])


# --- as before ---


def test_a_plain_folder_is_read_in_the_former_order_with_the_former_pixels(shots: Path) -> None:
    for number, name in enumerate(
        [
            "b/10.png",
            "b/9.png",
            "b/B.png",
            "b/a/1.png",
            "b/a b/1.png",
            "B/x.JPG",
            "B/y/z/1.png",
            "B/y.png",
        ]
    ):
        picture(shots / name, number)
    for channels in (1, 3):
        images, labels, classes = _image_folder(
            shots, DATA.model_copy(update={"channels": channels})
        )
        former = ImageFolder(str(shots))
        mode = "L" if channels == 1 else "RGB"
        expected = [
            np.asarray(former.loader(file).convert(mode).resize((8, 8))).reshape(8, 8, -1)
            for file, _ in former.samples
        ]
        assert np.array_equal(images, np.stack(expected).transpose(0, 3, 1, 2))
        assert labels.tolist() == former.targets
        assert classes == tuple(former.classes)


@pytest.mark.parametrize("whole", [False, True])
def test_splits_are_cut_as_before(shots: Path, whole: bool) -> None:
    pictures(shots, ("a", "b", "c"), 10)
    images, labels, _ = (
        torch.as_tensor(part) if index < 2 else part
        for index, part in enumerate(_image_folder(shots, DATA))
    )
    kept, test = stratified(labels, DATA.test_fraction, DATA.split_seed, 3)
    train, held = stratified(labels[kept], DATA.validation_fraction, DATA.split_seed, 3)
    splits = loaded(shots, train_on_validation=whole)
    assert torch.equal(splits.train.images, images[kept] if whole else images[kept][train])
    assert torch.equal(splits.train.labels, labels[kept] if whole else labels[kept][train])
    assert torch.equal(splits.validation.images, images[kept][held])
    assert torch.equal(load_test(DATA, shots.parent).images, images[test])
    example = load_example(DATA.model_copy(update={"train_on_validation": whole}), shots.parent)
    assert torch.equal(example.images, splits.train.images[:2])


def test_a_folder_is_cut_into_folds_without_being_read_again(shots: Path) -> None:
    pictures(shots, ("a", "b", "c"), 20)
    first = loaded(shots)
    assert first.folds == folds_of(DATA.validation_fraction) > 2
    for fold in range(first.folds):
        for whole in (False, True):
            data = DATA.model_copy(update={"fold": fold, "train_on_validation": whole})
            cut, read = first.cut_by(data), load_splits(data, shots.parent)
            for one, other in ((cut.train, read.train), (cut.validation, read.validation)):
                assert one.fingerprint == other.fingerprint
            assert torch.equal(cut.kept, read.kept)
            assert torch.equal(load_example(data, shots.parent).images, cut.train.images[:2])


def test_a_folder_with_a_validation_split_of_its_own_is_one_fold(shots: Path) -> None:
    pictures(shots / "train", count=10)
    pictures(shots / "val", count=3, first=300)
    first = loaded(shots)
    assert first.folds == 1
    message = "got 1, but there is one fold, 0, as the folder has a validation split of its own"
    with pytest.raises(DataError, match=message):
        loaded(shots, fold=1)
    with pytest.raises(DataError, match=message):
        first.cut_by(DATA.model_copy(update={"fold": 1}))
    whole = loaded(shots, train_on_validation=True)
    again = whole.cut_by(DATA)
    assert again.train.fingerprint == first.train.fingerprint
    assert again.validation.fingerprint == first.validation.fingerprint
    assert first.whole.fingerprint == whole.train.fingerprint


def test_the_fingerprint_of_a_plain_folder_is_what_earlier_versions_recorded(shots: Path) -> None:
    for label, name in enumerate(("x", "y")):
        for number in range(10):
            file = shots / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 7), 20 * label + number).save(file)
    splits = loaded(shots)
    assert splits.train.fingerprint == FINGERPRINTS[0]
    assert splits.validation.fingerprint == FINGERPRINTS[1]


FINGERPRINTS = (
    "658adbf12d6b42025a0493fd507af270e0e5c6eec3e26ce369c5a80e33a07051",
    "28026ad80aa170fbbb1d69892fed29debbe6e3d6727793b6d2a7400fe92cc09e",
)

# --- splits ---


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("train_set", "test_set"),
        ("trainset", "testset"), ("train-images", "test images"), ("Training Data", "Test Data"),
        ("images_train", "images_test"), ("training_set", "evaluation"),
    ],
)  # fmt: skip
def test_train_and_test_in_any_spelling_are_splits(shots: Path, train: str, test: str) -> None:
    pictures(shots / train, count=10)
    pictures(shots / test, count=3, first=500)
    splits = loaded(shots)
    assert splits.train.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(load_test(DATA, shots.parent))) == (
        16,
        4,
        6,
    )


@pytest.mark.parametrize(
    "name",
    ["val", "Val", "valid", "validation", "VALIDATION", "dev", "val_set", "validation-images"],
)
@pytest.mark.parametrize("test", [True, False])
def test_a_folder_for_validation_is_the_validation_split(
    shots: Path, name: str, test: bool
) -> None:
    pictures(shots / "train", count=10)
    pictures(shots / name, count=3, first=300)
    if test:
        pictures(shots / "test", count=2, first=500)
    splits = loaded(shots)
    assert (len(splits.train), len(splits.validation), len(load_test(DATA, shots.parent))) == (
        (20, 6, 4) if test else (16, 6, 4)
    )
    assert np.array_equal(splits.validation.images, _image_folder(shots / name, DATA)[0])
    assert f"validation is {name}/" in said(splits)
    assert ("set apart as test" in said(splits)) == (not test)
    whole = loaded(shots, train_on_validation=True)
    assert len(whole.train) == len(splits.train) + len(splits.validation)
    assert torch.equal(whole.validation.images, splits.validation.images)


def test_a_train_folder_alone_gives_the_test_split_too_and_that_is_said(shots: Path) -> None:
    pictures(shots / "train", count=10)
    splits = loaded(shots)
    assert splits.train.classes == ("cat", "dog")
    assert "there is no test/: 20% of train/ are set apart as test" in said(splits)
    assert torch.equal(splits.train.images, loaded(shots, path="shots/train").train.images)


def test_a_class_may_be_called_train_or_test(shots: Path) -> None:
    assert loaded(pictures(shots, ("train", "car", "plane"))).train.classes == (
        "car",
        "plane",
        "train",
    )
    assert loaded(
        pictures(shots.parent / "other", ("test", "control")), path="other"
    ).train.classes == ("control", "test")


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("train", "test"), ("would be a split", "no class folders", "test/, train/")),
        (("Train",), ("would be a split", "Train/")),
        (
            ("train/cat", "train/dog", "Training/cat", "Training/dog"),
            ("both", "Training/", "train/", "rename one"),
        ),
        (
            ("train/cat", "train/dog", "val/cat", "val/dog", "valid/cat", "valid/dog"),
            ("both", "val/", "valid/"),
        ),
        (("test/cat", "test/dog"), ("no train/", "rename")),
        (("val/cat", "val/dog", "test/cat", "test/dog"), ("no train/",)),
        (("train/steam", "train/diesel", "car"), ("car/", "beside it")),
        (("train/cat", "train/dog", "test"), ("test/", "no class folders")),
        (
            ("train/cat", "train/dog", "test/cat", "test/Dog"),
            ("only one of them has", "Dog (in test/)", "dog (in train/)"),
        ),
        (
            ("train/a", "train/b", "val/a", "test/a", "test/b"),
            ("not all of them have", "b (in train/ and test/)"),
        ),
    ],
)
def test_a_layout_that_could_mean_two_things_is_refused_with_the_reason(
    shots: Path, folders, words
) -> None:
    for number, folder in enumerate(folders):
        pictures(shots, [folder], first=100 * number)
    refused(shots, *words)


def test_folders_beside_the_splits_are_left_out_and_said(shots: Path) -> None:
    pictures(shots / "train", count=10)
    pictures(shots / "test", first=500)
    pictures(shots, ["all"], first=700)
    splits = loaded(shots)
    assert splits.train.classes == ("cat", "dog")
    assert "1 left out: 1 beside the splits" in said(splits)


def test_one_folder_too_deep_is_refused_with_what_to_pass(shots: Path) -> None:
    pictures(shots / "flowers")
    refused(shots, "only one class (flowers)", "--set data.path=shots/flowers")
    pictures(shots / "flowers" / "deep" / "train")
    assert len(loaded(shots, path="shots/flowers").train.classes) == 3


def test_a_folder_of_splits_further_down_is_found(shots: Path) -> None:
    pictures(shots / "release" / "v1" / "train")
    pictures(shots / "release" / "v1" / "test", first=500)
    refused(shots, "--set data.path=shots/release/v1")


def test_one_folder_too_high_up_or_an_empty_one_is_said(shots: Path) -> None:
    pictures(shots)
    with pytest.raises(DataError, match="one sub-folder per class"):
        loaded(shots, path="shots/cat")
    (shots.parent / "void").mkdir()
    with pytest.raises(DataError, match="is empty"):
        loaded(shots, path="void")
    with pytest.raises(DataError, match="no folder"):
        loaded(shots, path="shots/cat/0.png")


# --- classes ---


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_class_with_few_images_is_named_with_what_it_needs(shots: Path, count: int) -> None:
    pictures(shots)
    (shots / "fox").mkdir()
    pictures(shots, ["fox"], count, first=77)
    if count == 3:
        assert len(loaded(shots).train) == 9
    else:
        refused(shots, f"class 'fox' has {count or 'no'} image", "needs 3")


@pytest.mark.parametrize("part", ["train", "test", "val"])
def test_a_class_without_images_in_one_split_is_named(shots: Path, part: str) -> None:
    for number, name in enumerate(("train", "test", "val")):
        pictures(shots / name, first=100 * number)
    for file in (shots / part / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    refused(shots, "class 'dog' has no images", f"shots/{part}", "needs 1", "6 .heic")


def test_class_names_are_kept_as_text_whatever_they_are_made_of(shots: Path) -> None:
    names = [
        "Äpfel & Birnen 🍐",
        '-it\'s "one"',
        "007",
        "a b",
        "ends.png",
        "new\nline",
        "#%?",
        "知識",
    ]
    pictures(shots, names)
    (shots / "cat").mkdir()
    os.rename(shots / "cat", os.fsencode(shots) + b"/caf\xe9")  # noqa: PTH104
    pictures(shots, [os.fsdecode(b"caf\xe9")], first=9000)
    splits = loaded(shots)
    assert {*names[:5], *names[6:], "caf\\xe9", "new\\nline"} == set(splits.train.classes)
    "".join(splits.train.classes).encode("utf-8")
    said(splits).encode("utf-8")
    (shots / os.fsdecode(b"caf\xe9") / "0.png").write_bytes(b"")
    refused(shots, "caf\\xe9/0.png", "is empty").encode("utf-8")


def test_a_class_name_is_the_same_composed_and_decomposed(shots: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    pictures(shots / "train", [composed, "zoo", "tea"])
    pictures(shots / "test", [decomposed, "zoo", "tea"], first=500)
    splits, test = loaded(shots), load_test(DATA, shots.parent)
    assert (
        splits.train.classes == test.classes == (composed, "tea", "zoo")
        or splits.train.classes == test.classes
    )
    expected = {
        name: _image_folder(shots / "test", DATA)[0][6 * index]
        for index, name in enumerate(sorted([decomposed, "tea", "zoo"]))
    }
    for label, name in enumerate(test.classes):
        first = test.images[(test.labels == label).nonzero()[0, 0]].numpy()
        assert np.array_equal(first, expected[decomposed if name == composed else name])
    pictures(shots / "train", [decomposed])
    refused(shots, "the same name, written in two ways")


# --- what is left out ---


def test_hidden_and_system_files_are_neither_images_nor_classes(shots: Path) -> None:
    pictures(shots)
    for name in (
        ".DS_Store",
        "cat/._0.png",
        "cat/Thumbs.db",
        "dog/desktop.ini",
        "dog/.hidden.png",
        "Icon\r",
        "dog/0.png~",
    ):
        (shots / name).write_bytes(b"\0\5\x16\7")
    pictures(shots, [".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints", "dog/@eaDir"])
    splits = loaded(shots)
    assert splits.train.classes == ("cat", "dog")
    assert (
        str(splits.inspection)
        == "12 images (8 training, 2 validation, 2 test), 2 classes, 11 left out: 11 hidden"
    )


def test_what_is_left_out_is_counted_by_its_suffix(shots: Path) -> None:
    pictures(shots)
    for name in ("cat/a.txt", "dog/b.TXT", "dog/c.xml", "cat/README", "labels.csv", "dog/d.heic"):
        (shots / name).write_text("no image")
    picture(shots / "stray.png", 5)
    assert str(loaded(shots).inspection).endswith(
        "7 left out: 2 .txt, 1 .csv, 1 .heic, 1 .xml, 1 in no class folder, 1 without a suffix"
    )


def test_images_in_folders_below_a_class_belong_to_it(shots: Path) -> None:
    pictures(shots)
    picture(shots / "cat" / "deep" / "er" / "x.png", 50)
    assert len(_image_folder(shots, DATA)[0]) == 13


# --- links ---


@pytest.mark.parametrize("target", ["..", "../..", ".", "../cat"])
def test_a_link_that_leads_back_is_not_followed_and_said(shots: Path, target: str) -> None:
    pictures(shots)
    (shots / "cat" / "loop").symlink_to(target)
    splits = loaded(shots)
    assert "12 images" in said(splits)
    assert "1 a link back" in said(splits)


def test_links_that_go_in_circles_end(shots: Path) -> None:
    pictures(shots)
    (shots / "cat" / "a").mkdir()
    (shots / "cat" / "b").mkdir()
    picture(shots / "cat" / "b" / "x.png", 60)
    (shots / "cat" / "a" / "to_b").symlink_to("../b")
    (shots / "cat" / "b" / "to_a").symlink_to("../a")
    (shots / "cat" / "self").symlink_to("self")
    (shots / "everything").symlink_to(".")
    found = survey(shots, "shots")
    assert [str(sample.file.relative_to(shots)) for sample in found.splits["training"]][:7] == [
        *(f"cat/{number}.png" for number in range(6)), "cat/b/x.png"
    ]  # fmt: skip
    assert len(found.splits["training"]) == 13
    assert found.left_out == {"a link back": 3, "without a suffix": 1}


def test_links_to_files_and_folders_elsewhere_are_followed_and_each_real_file_counts_once(
    shots: Path, tmp_path: Path
) -> None:
    pictures(shots, count=4)
    elsewhere = pictures(tmp_path / "elsewhere", ["more"], 3, first=80) / "more"
    (shots / "cat" / "more").symlink_to(elsewhere)
    (shots / "cat" / "again.png").symlink_to(elsewhere / "1.png")
    (shots / "cat" / "twin.png").symlink_to("0.png")
    (shots / "fox").symlink_to(pictures(tmp_path / "outside", ["fox"], 5, first=90) / "fox")
    splits = loaded(shots)
    assert splits.train.classes == ("cat", "dog", "fox")
    assert "16 images" in said(splits)
    assert "2 another link to the same file" in said(splits)


def test_a_link_to_nothing_is_named(shots: Path) -> None:
    pictures(shots)
    (shots / "cat" / "gone.png").symlink_to("nowhere.png")
    refused(shots, "cat/gone.png", "No such file")


def test_one_file_under_two_labels_is_said(shots: Path) -> None:
    pictures(shots)
    (shots / "dog" / "x.png").symlink_to("../cat/0.png")
    assert (
        "1 image is there under more than one label, pixel for pixel: cat/0.png is dog/x.png"
        in said(loaded(shots)).replace("dog/x.png is cat/0.png", "cat/0.png is dog/x.png")
    )


# --- all images are opened first ---


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_broken_image_of_any_split_is_named_with_its_split(
    shots: Path, part: str, content: bytes
) -> None:
    for number, name in enumerate(("train", "test", "val")):
        pictures(shots / name, first=100 * number)
    (shots / part / "dog" / "3.png").write_bytes(content)
    refused(
        shots,
        f"shots/{part}/dog/3.png",
        {"train": "training", "val": "validation", "test": "test"}[part] + " split",
    )


def test_several_broken_images_are_told_at_once(shots: Path) -> None:
    pictures(shots)
    for number in range(5):
        (shots / "dog" / f"{number}.png").write_bytes(b"")
    assert refused(shots, "5 images cannot be read").count("is empty") == 3


def test_a_test_image_that_breaks_later_is_noticed_again(shots: Path) -> None:
    for number, name in enumerate(("train", "test")):
        pictures(shots / name, first=100 * number)
    loaded(shots)
    (shots / "test" / "dog" / "3.png").write_bytes(b"now broken")
    refused(shots, "test/dog/3.png")


def test_each_image_is_opened_once_and_of_test_only_what_is_needed(
    shots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(shots / "train", count=10)
    pictures(shots / "test", count=3, first=500)
    opened: list[str] = []

    def counted(file: Path, size: int, channels: int):
        opened.append(file.relative_to(shots).parts[0])
        return read(file, size, channels)

    monkeypatch.setattr(inspection, "read", counted)
    for load, expected in (
        (lambda: loaded(shots), {"train": 20, "test": 6}),
        # test images that are as they were need not be looked over again
        (lambda: loaded(shots), {"train": 20}),
        (lambda: load_test(DATA, shots.parent), {"test": 6}),
        (lambda: load_example(DATA, shots.parent), {"train": 2}),
    ):
        opened.clear()
        load()
        assert Counter(opened) == expected


def test_images_that_no_memory_holds_are_refused_with_what_they_would_take(
    shots: Path, monkeypatch
) -> None:
    pictures(shots)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    refused(shots, "10 images of 8 x 8 pixels", "lower data.image_size")


def test_a_folder_that_may_not_be_read_is_named(
    shots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(shots)
    scandir = os.scandir

    def closed(folder: Path):  # root reads everything
        if folder == shots / "cat":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    refused(shots, "shots/cat", "Permission denied")


# --- what is said of them ---


def test_equal_images_in_two_splits_are_counted_and_said(shots: Path) -> None:
    for name, first in (("train", 0), ("val", 300), ("test", 600)):
        pictures(shots / name, first=first)
    assert "among the training images" not in said(loaded(shots))
    for number in range(3):
        Image.open(shots / "train" / "cat" / f"{number}.png").save(
            shots / "test" / "cat" / f"copy{number}.bmp"
        )
    Image.open(shots / "train" / "dog" / "1.png").save(shots / "val" / "dog" / "copy.png")
    heard = said(loaded(shots))
    assert (
        "3 test images are among the training images too, pixel for pixel: test/cat/copy0.bmp is"
        " train/cat/0.png" in heard
    )
    assert "1 validation image is among the training images too" in heard


def test_what_was_done_to_images_is_said(shots: Path) -> None:
    pictures(shots)
    Image.new("RGBA", (9, 9), (0, 0, 0, 9)).save(shots / "cat" / "a.png")
    Image.fromarray(np.full((9, 9), 60_000, np.uint16)).save(shots / "cat" / "b.png")
    Image.fromarray(np.full((9, 9), 0.7, np.float32)).save(shots / "cat" / "c.tif")
    heard = said(loaded(shots))
    for text in (
        "1 laid over white where transparent",
        "1 of 16 bits: scaled to 8 (value / 257)",
        "1 of floats from 0 to 1",
    ):
        assert text in heard


def test_twelve_bits_in_sixteen_are_said_to_be_dark_and_eight_in_sixteen_refused(
    shots: Path,
) -> None:
    for name in ("cat", "dog"):
        for number in range(6):
            file = picture(shots / name / f"{number}.png", number)
            Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16) * 16).save(file)
    assert "of 65,535: these images are dark" in said(loaded(shots))
    for file in shots.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 16).save(file)
    refused(shots, "has 16 bits and values up to 25", "black")


def test_floats_of_two_scales_in_one_folder_are_refused(shots: Path) -> None:
    pictures(shots)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(shots / "cat" / "black.tif")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(shots / "cat" / "a.tif")
    loaded(shots)
    Image.fromarray(np.full((9, 9), 128.0, np.float32)).save(shots / "dog" / "b.tif")
    refused(shots, "cat/a.tif", "dog/b.tif", "scale")


def test_what_has_changed_is_told_by_name() -> None:
    then = {"a": "1", "b": "2", "c": "3", "d": "4"}
    assert changed(then, then) == ""
    assert (
        changed(then, {"a": "1", "x": "2", "c": "9", "e": "5"})
        == "1 renamed (b → x), 1 added (e), 1 removed (d), 1 with other pixels (c)"
    )
    many = {f"n{number}": str(number) for number in range(9)}
    assert changed({}, many) == "9 added (n0, n1, n2, n3, n4 and 4 more)"
