"""Images as tensors: splits, views, normalisation, fingerprints, and every way a file can be
wrong.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdexp.config import Augment, Data
from kdexp.distill import datasets as data_module
from kdexp.distill.batches import pixels, rectangles, views
from kdexp.distill.datasets import (
    DataError,
    Split,
    Splits,
    folds_of,
    load_splits,
    load_test,
    stratified,
)


def split(images: torch.Tensor, channels: int = 1, mean: float = 0.5, std: float = 0.5) -> Split:
    return Split(
        images, torch.zeros(len(images), dtype=torch.int64), ("a", "b"), channels, mean, std
    )


def test_digits_are_all_there_and_no_sample_is_in_two_splits() -> None:
    data = Data(dataset="digits", channels=1)
    splits, test = load_splits(data), load_test(data)
    assert (len(splits.train), len(splits.validation), len(test)) == (1295, 143, 359)
    together = [
        image.numpy().tobytes()
        for part in (splits.train, splits.validation, test)
        for image in part.images
    ]
    whole = data_module._digits()[0]
    assert sorted(together) == sorted(image.tobytes() for image in whole)


def test_the_split_is_fixed_by_the_config() -> None:
    one, same, other = (load_splits(Data(dataset="digits", split_seed=seed)) for seed in (1, 1, 2))
    assert one.validation.fingerprint == same.validation.fingerprint != other.validation.fingerprint


def test_a_fingerprint_knows_pixels_labels_and_order() -> None:
    images = torch.arange(2 * 4, dtype=torch.uint8).reshape(2, 1, 2, 2)
    base = split(images).fingerprint
    assert base == split(images.clone()).fingerprint
    assert base != split(images + 1).fingerprint
    assert base != split(images.flip(0)).fingerprint
    changed = Split(images, torch.tensor([0, 1]), ("a", "b"), 1, 0.5, 0.5)
    assert base != changed.fingerprint


@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 1000),
)
def test_a_stratified_split_takes_its_share_of_every_class(counts, fraction, seed) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    kept, held = stratified(labels, fraction, seed, len(counts))
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    for label, count in enumerate(counts):
        share = int((labels[held] == label).sum())
        assert 1 <= share <= count - 1
        assert abs(share - fraction * count) <= 1


def test_a_class_with_one_sample_cannot_be_split() -> None:
    with pytest.raises(DataError, match="class 1 has 1 samples"):
        stratified(torch.tensor([0, 0, 1]), 0.5, 0, 2)


# --- folds ---


def fold_0_as_ever(labels: torch.Tensor, fraction: float, seed: int, classes: int) -> torch.Tensor:
    """What was held out before there were folds."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return held.nonzero().flatten()


@given(
    st.lists(st.integers(2, 60), min_size=2, max_size=6),
    st.floats(0.02, 0.99),
    st.integers(0, 1000),
)
def test_every_image_is_in_one_fold_and_every_class_in_each_training_set(
    counts, fraction, seed
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    many, first = folds_of(fraction), fold_0_as_ever(labels, fraction, seed, len(counts))
    others = min(many - 1, len(labels) - len(first))  # where there are enough images
    cuts = [stratified(labels, fraction, seed, len(counts), fold) for fold in range(1 + others)]
    assert torch.equal(cuts[0][1], first)
    if others:
        assert torch.equal(
            torch.cat([held for _, held in cuts]).sort().values, torch.arange(len(labels))
        )
    for kept, held in cuts:
        assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
        assert torch.bincount(labels[kept], minlength=len(counts)).min() >= 1
    shares = [torch.bincount(labels[held], minlength=len(counts)) for _, held in cuts[1:]]
    if shares:
        each = torch.stack(shares)
        assert (each.amax(0) - each.amin(0)).max() <= 1, "of each class"
        assert each.sum(1).max() - each.sum(1).min() <= 1, "in all"


def test_too_few_images_for_a_fold_are_said() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(DataError, match=r"4 images leave none for fold 7; .* folds 0 to 2"):
        stratified(labels, 0.1, 0, 2, 7)


def all_folds(data: Data) -> list[Splits]:
    """The splits of each fold, cut in memory, which are those that would be loaded."""
    first = load_splits(data)
    every = [first.cut_by(data.model_copy(update={"fold": fold})) for fold in range(first.folds)]
    for fold, splits in enumerate(every):
        loaded = load_splits(data.model_copy(update={"fold": fold}))
        assert splits.train.fingerprint == loaded.train.fingerprint
        assert splits.validation.fingerprint == loaded.validation.fingerprint
        assert torch.equal(splits.kept, loaded.kept)
        assert torch.equal(splits.held, loaded.held)
        assert splits.folds == loaded.folds == first.folds
    return every


def check_folds(every: list[Splits]) -> None:
    """Disjoint, covering, stratified, and each with all images, at their places."""
    whole = every[0].whole
    held = torch.cat([splits.held for splits in every])
    assert torch.equal(held.sort().values, torch.arange(len(whole)))
    for splits in every:
        assert splits.whole.fingerprint == whole.fingerprint
        assert torch.equal(whole.images[splits.held], splits.validation.images)
        assert torch.equal(whole.labels[splits.kept], splits.train.labels)
        share = torch.bincount(splits.validation.labels, minlength=len(whole.classes))
        expected = torch.bincount(whole.labels) / len(every)
        assert (share - expected).abs().max() < 1.5


@pytest.mark.parametrize(("fraction", "folds"), [(0.2, 5), (0.1, 10), (0.25, 4), (0.5, 2)])
def test_digits_are_cut_into_folds(fraction: float, folds: int) -> None:
    every = all_folds(Data(dataset="digits", channels=1, validation_fraction=fraction))
    assert len(every) == folds
    check_folds(every)
    assert len({splits.validation.fingerprint for splits in every}) == folds


@pytest.mark.parametrize("fold", [0, 3])
def test_any_fold_is_cut_into_any_other_and_into_all_images(fold: int) -> None:
    data = Data(dataset="digits", channels=1, validation_fraction=0.2, fold=fold)
    other = data.model_copy(update={"fold": 1})
    whole = data.model_copy(update={"train_on_validation": True})
    one = load_splits(data)
    for target in (data, other, whole):
        loaded = load_splits(target)
        for way in (one.cut_by(target), one.cut_by(whole).cut_by(target)):
            assert way.train.fingerprint == loaded.train.fingerprint
            assert way.validation.fingerprint == loaded.validation.fingerprint
            assert torch.equal(way.kept, loaded.kept)
    assert len(load_splits(whole).train) == len(one.train) + len(one.validation)


def test_a_fold_beyond_the_last_is_said() -> None:
    data = Data(dataset="digits", channels=1, validation_fraction=0.2, fold=5)
    message = (
        r"data.fold: got 5, but there are 5 folds, 0 to 4, as data.validation_fraction is 0.2; set"
        r" data.fold to one of them"
    )
    with pytest.raises(DataError, match=message):
        load_splits(data)
    with pytest.raises(DataError, match=message):
        load_splits(data.model_copy(update={"fold": 0})).cut_by(data)
    half = data.model_copy(update={"fold": 1, "validation_fraction": 0.7})
    with pytest.raises(DataError, match=r"there is one fold, 0, as data.validation_fraction"):
        load_splits(half)


def test_splits_cut_by_hand_are_cut_in_no_other_way(digits) -> None:
    few = Splits(digits.train, digits.validation)
    with pytest.raises(ValueError, match="only splits out of load_splits"):
        few.cut_by(Data(dataset="digits", fold=1))


def test_the_test_split_is_the_same_whatever_fold_is_held_out() -> None:
    one, other = (load_test(Data(dataset="digits", fold=fold)) for fold in (0, 4))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("flip", "shift", "count"), [(False, 0, 1), (True, 0, 2), (False, 1, 9), (True, 2, 50)]
)
def test_the_views_are_finite_distinct_and_begin_with_the_image(flip, shift, count) -> None:
    found = views(Augment(flip=flip, shift=shift))
    assert found.shape == (count, 3)
    assert len({tuple(view) for view in found.tolist()}) == count
    assert found[0].tolist() == [0, 0, 0]


@given(st.integers(0, 1), st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 100))
def test_a_view_shifts_then_flips_and_fills_with_black(flip, down, right, seed) -> None:
    image = torch.randint(
        1, 256, (1, 1, 5, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    expected = torch.zeros_like(image)
    for row in range(5):
        for column in range(4):
            if 0 <= row - down < 5 and 0 <= column - right < 4:
                expected[0, 0, row, column] = image[0, 0, row - down, column - right]
    if flip:
        expected = expected.flip(-1)
    got = pixels(
        split(image, mean=0.0, std=1.0), torch.tensor([0]), torch.tensor([[flip, down, right]])
    )
    assert torch.equal((got * 255).round().to(torch.uint8), expected)


def test_pixels_are_normalised_and_grey_is_replicated() -> None:
    image = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    got = pixels(split(image, channels=3), torch.tensor([0]))
    assert got.tolist() == [[[[-1.0, 1.0]]] * 3]


def test_without_views_a_batch_is_that_of_the_first_view() -> None:
    images = torch.randint(256, (3, 3, 6, 6), dtype=torch.uint8)
    samples, first = torch.tensor([2, 0]), torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(pixels(split(images, 3), samples), pixels(split(images, 3), samples, first))


# --- folders of images ---


def save(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def test_a_folder_of_images_with_train_and_test(tmp_path) -> None:
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                save(
                    tmp_path / "pets" / part / label / f"{number}.png",
                    10 * number,
                    "RGB" if number % 2 else "L",
                )
    data = Data(
        dataset="image_folder", path="pets", image_size=8, channels=3, validation_fraction=0.34
    )
    splits, test = load_splits(data, tmp_path), load_test(data, tmp_path)
    assert splits.train.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(test)) == (8, 4, 4)
    assert splits.train.images.shape[1:] == (3, 8, 8)


def test_a_plain_folder_of_classes_gets_a_test_split_of_its_own(tmp_path) -> None:
    for label in ("x", "y"):
        for number in range(10):
            save(tmp_path / label / f"{number}.png", number)
    data = Data(dataset="image_folder", path=".", image_size=8, channels=1, test_fraction=0.2)
    assert len(load_test(data, tmp_path)) == 4
    assert len(load_splits(data, tmp_path).train) == 14


@pytest.mark.parametrize("missing", ["train", "test"])
def test_train_and_test_must_hold_the_same_classes(tmp_path, missing) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog", "fox"):
            if (part, label) != (missing, "cat"):
                save(tmp_path / part / label / "0.png", 1)
    data = Data(dataset="image_folder", path=".", image_size=8)
    for load in (load_splits, load_test):
        with pytest.raises(DataError, match="only one of them has: cat"):
            load(data, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_a_broken_picture_is_named(tmp_path, content) -> None:
    for label in ("x", "y"):
        for number in range(3):
            save(tmp_path / label / f"{number}.png", number)
    (tmp_path / "x" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png"):
        load_splits(Data(dataset="image_folder", path=".", image_size=8), tmp_path)


def test_a_missing_folder_and_a_folder_without_classes_are_said(tmp_path) -> None:
    with pytest.raises(DataError, match="no folder .*nowhere"):
        load_splits(Data(dataset="image_folder", path="nowhere", image_size=8), tmp_path)
    with pytest.raises(DataError, match="one sub-folder per class"):
        load_splits(Data(dataset="image_folder", path=".", image_size=8), tmp_path)


# --- idx files ---


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(size.to_bytes(4, "big") for size in array.shape)
        + array.tobytes()
    )


def mnist_folder(folder: Path, samples: int = 40) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = generator.integers(0, 256, (samples, 28, 28)).astype(np.uint8)
        labels = (np.arange(samples) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return raw


def test_unpacked_idx_files_are_read(tmp_path) -> None:
    mnist_folder(tmp_path)
    splits = load_splits(Data(dataset="mnist"), tmp_path)
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.train.classes[0] == "0 - zero"


def test_missing_test_files_are_found_out_before_a_sweep_not_after(tmp_path) -> None:
    (mnist_folder(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_splits(Data(dataset="mnist"), tmp_path)


def break_file(raw: Path, how: str) -> None:
    file = raw / "train-images-idx3-ubyte"
    content = file.read_bytes()
    match how:
        case "empty":
            file.write_bytes(b"")
        case "cut short":
            file.write_bytes(content[:-5])
        case "too long":
            file.write_bytes(content + b"x")
        case "no idx":
            file.write_bytes(b"PK" + content[2:])
        case "torn header":
            file.write_bytes(content[:9])
        case "many dimensions":
            file.write_bytes(b"\x00\x00\x08\xff" + content[4:])
        case "broken gzip":
            file.with_suffix(".gz").write_bytes(gzip.compress(content)[:-100])
        case "wrong gzip":
            file.with_suffix(".gz").write_bytes(b"\x1f\x8bnonsense")
        case "another archive":
            file.with_suffix(".gz").write_bytes(gzip.compress(content))
        case "fewer labels":
            (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(39, np.uint8)))
        case "label out of range":
            (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.full(40, 11, np.uint8)))


BROKEN = [
    "empty",
    "cut short",
    "too long",
    "no idx",
    "torn header",
    "many dimensions",
    "broken gzip",
    "wrong gzip",
    "another archive",
    "fewer labels",
    "label out of range",
]


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_idx_file_is_said_in_one_line(tmp_path, how) -> None:
    raw = mnist_folder(tmp_path)
    break_file(raw, how)
    with pytest.raises(DataError) as error:
        load_splits(Data(dataset="mnist"), tmp_path)
    assert "\n" not in str(error.value)
    assert "again" in str(error.value)


def test_a_missing_data_folder_is_said_not_downloaded_into(tmp_path) -> None:
    with pytest.raises(DataError, match="--data-dir"):
        load_splits(Data(dataset="fashion_mnist"), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# --- the real one ---


@pytest.mark.fashion
@pytest.mark.usefixtures("fashion")
def test_fashion_mnist_is_the_real_one() -> None:
    data = Data()
    splits, test = load_splits(data), load_test(data)
    assert (len(splits.train), len(splits.validation), len(test)) == (54_000, 6_000, 10_000)
    assert splits.train.images.shape[1:] == (1, 28, 28)
    assert torch.bincount(splits.validation.labels).tolist() == [600] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert splits.train.classes[0] == "T-shirt/top"


@pytest.mark.fashion
@pytest.mark.usefixtures("fashion")
def test_fashion_mnist_is_cut_into_ten_folds_of_600_of_each_class() -> None:
    data = Data()
    first = load_splits(data)
    every = [first.cut_by(data.model_copy(update={"fold": fold})) for fold in range(first.folds)]
    assert len(every) == 10
    check_folds(every)
    for splits in every:
        assert torch.bincount(splits.validation.labels).tolist() == [600] * 10
    last = load_splits(data.model_copy(update={"fold": 9}))
    assert last.train.fingerprint == every[9].train.fingerprint


@pytest.mark.fashion
def test_a_flipped_bit_in_fashion_mnist_is_noticed(tmp_path, fashion) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(fashion, raw)
    file = raw / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[1000] ^= 1
    file.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DataError, match=f"corrupt: MD5 {hashlib.md5(content).hexdigest()}"):
        load_splits(Data(), tmp_path)


def test_random_erasing_takes_rectangles_of_the_published_sizes_from_its_share_of_the_images() -> (
    None
):
    taken = rectangles(0.3, 20_000, (28, 28), torch.Generator().manual_seed(1))
    top, bottom, left, right = taken.unbind(1)
    area = (bottom - top) * (right - left)
    assert taken.min() >= 0
    assert taken.max() <= 28
    some = area > 0
    assert some.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert area[some].min().item() >= 0.01 * 784
    assert area[some].max().item() <= 0.42 * 784
    assert area[some].double().mean().item() / 784 == pytest.approx(0.2, abs=0.02)
    assert not rectangles(0.0, 100, (28, 28), torch.Generator()).any()


def test_what_is_erased_is_grey_and_nothing_else_changes(digits) -> None:
    samples, erased = torch.arange(3), torch.tensor([[1, 4, 2, 7], [0, 0, 0, 0], [0, 8, 0, 8]])
    before, after = pixels(digits.train, samples), pixels(digits.train, samples, None, erased)
    assert torch.equal(after[1], before[1])
    assert not after[2].any()
    assert not after[0, :, 1:4, 2:7].any()
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[1:4, 2:7] = False
    assert torch.equal(after[0, 0][outside], before[0, 0][outside])
