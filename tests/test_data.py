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
from kdexp.distill.datasets import DataError, Split, load_splits, load_test, stratified


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
