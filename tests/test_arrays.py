"""Arrays of one's own: the layouts that people have, what is made of their numbers, and what is
refused.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, drain, tiny_sweep
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as drawn
from scipy.io import savemat
from sklearn.datasets import load_digits

from kdexp.config import ConfigError, Data, load
from kdexp.distill.arrays import arrays_in, train_and_test
from kdexp.distill.datasets import DataError, load_splits, load_test
from kdexp.runs.records import recipe_of
from kdexp.search.sweep import run_sweep
from kdexp.select.promote import promote
from kdexp.select.reproduce import reproduce

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images * 255 / 16).astype(np.uint8)
OWN = """
import numpy as np
from sklearn.datasets import load_digits

def load():
    digits = load_digits()
    return {"images": np.rint(digits.images * 255 / 16).astype(np.uint8), "labels": digits.target}
"""


def raw(arrays):
    return train_and_test(arrays, "x")


def two(**more):
    """Two images of two classes."""
    return {"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1]} | more


def test_medmnists_layout_joins_validation_to_training(tmp_path: Path) -> None:
    parts = {"train": slice(0, 1000), "val": slice(1000, 1200), "test": slice(1200, None)}
    stored = {f"{part}_images": PIXELS[cut] for part, cut in parts.items()}
    stored |= {f"{part}_labels": DIGITS.target[cut][:, None] for part, cut in parts.items()}
    np.savez_compressed(tmp_path / "medmnist.npz", **stored)
    data = Data(dataset="arrays", path="medmnist.npz", channels=1)
    splits, test = load_splits(data, tmp_path), load_test(data, tmp_path)
    assert len(splits.train) + len(splits.validation) == 1200
    assert torch.equal(splits.whole.images[:, 0], torch.from_numpy(PIXELS[:1200]))
    assert torch.equal(test.labels, torch.from_numpy(DIGITS.target[1200:]))
    assert test.classes == tuple("0123456789")
    assert splits.folds == 10


def test_kerass_layout_and_one_piece_are_read(tmp_path: Path) -> None:
    keras = {"x_train": PIXELS[:9], "y_train": range(9), "x_test": PIXELS[9:18], "y_test": range(9)}
    (images, labels, classes), test = raw(keras)
    assert images.shape == (9, 1, 8, 8)
    assert list(labels) == list(range(9))
    assert len(classes) == 9
    assert test is not None
    assert len(test[0]) == 9
    assert raw({"images": PIXELS, "labels": DIGITS.target})[1] is None
    for name in ("images", "labels"):
        np.save(tmp_path / f"{name}.npy", {"images": PIXELS, "labels": DIGITS.target}[name])
    data = Data(dataset="arrays", path=str(tmp_path), channels=1)
    one, digits = load_splits(data), load_splits(Data(dataset="digits", channels=1))
    assert one.train.fingerprint == digits.train.fingerprint, "cut as scikit-learn's digits are"
    assert (
        load_test(data).fingerprint
        == load_test(digits_data := Data(dataset="digits", channels=1)).fingerprint
    )
    assert digits_data.test_fraction == data.test_fraction


@given(drawn(np.uint8, (2, 4, 4, 3)))
def test_every_way_to_write_pixels_gives_the_same(pixels: np.ndarray) -> None:
    def images(of):
        return raw(two(images=of))[0][0]

    expected = pixels.transpose(0, 3, 1, 2)
    for same in (
        pixels,
        expected,
        pixels.astype(np.int64),
        pixels.astype(np.float32) / 255,
        pixels.tolist(),
    ):
        assert np.array_equal(images(same), expected)
    assert np.array_equal(images(pixels[..., 0]), pixels[..., 0][:, None])
    assert np.array_equal(images(pixels[..., :1]), pixels[..., 0][:, None])


@given(st.lists(st.sampled_from(["b", "a", "Blüte"]), min_size=2, max_size=9))
def test_names_become_classes_in_order(names: list[str]) -> None:
    arrays = {"images": np.zeros((len(names), 4, 4), np.uint8), "labels": names}
    _, labels, classes = raw(arrays)[0]
    assert classes == tuple(sorted(set(names)))
    assert [classes[label] for label in labels] == names


def test_numbers_that_do_not_begin_at_0_keep_their_names() -> None:
    assert raw(two(labels=[3, 11]))[0][2] == ("3", "11")
    assert list(raw(two(labels=[11, 3]))[0][1]) == [1, 0]
    assert raw(two(classes=["cat", "dog"]))[0][2] == ("cat", "dog")
    assert list(raw(two(labels=np.array([[1.0], [0.0]])))[0][1]) == [1, 0]


REFUSED = {
    "no labels": ({"images": PIXELS}, "holds images; what is read is"),
    "nothing": ({}, "holds nothing"),
    "flat": (two(images=np.zeros((2, 16), np.uint8)), r"of shape \(2, 16\); give"),
    "four channels": (two(images=np.zeros((2, 4, 4, 4), np.uint8)), "1 or 3 channels"),
    "not square": (two(images=np.zeros((2, 4, 5), np.uint8)), "4x5 pixels; make squares"),
    "normalised": (two(images=np.full((2, 4, 4), -0.5)), "float64 of -0.5 to -0.5; give uint8"),
    "between": (two(images=np.full((2, 4, 4), 1.5)), "give uint8, 0 to 255, or floats"),
    "NaN": (two(images=np.full((2, 4, 4), np.nan)), "nan to nan"),
    "16 bits": (two(images=np.full((2, 4, 4), 300, np.uint16)), "uint16 of 300 to 300"),
    "text": (two(images=np.full((2, 4, 4), "x")), "give uint8"),
    "one-hot": (two(labels=np.eye(2)), "one label for each image"),
    "fractions": (two(labels=[0.5, 1]), "whole numbers, or names"),
    "an unknown one in test": (
        {"x_train": PIXELS[:2], "y_train": [0, 1], "x_test": PIXELS[:1], "y_test": [7]},
        "no training image has: 7",
    ),
    "another size in test": (
        {"x_train": PIXELS[:2], "y_train": [0, 1], "x_test": np.zeros((1, 9, 9), np.uint8)}
        | {"y_test": [1]},
        "make them alike",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_rule_is_refused_in_one_line(case: str) -> None:
    arrays, said = REFUSED[case]
    with pytest.raises(DataError, match=said) as failure:
        raw(arrays)
    assert "\n" not in str(failure.value)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.npz: no such file"):
        arrays_in(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(DataError, match=r"text\.npz: cannot be read"):
        arrays_in(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", PIXELS)
    with pytest.raises(DataError, match="one array without a name"):
        arrays_in(tmp_path / "one.npy")
    np.savez(tmp_path / "pickled.npz", images=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="cannot be read as arrays of numbers"):
        arrays_in(tmp_path / "pickled.npz")
    labels = np.arange(4) % 2
    np.savez(tmp_path / "short.npz", images=PIXELS[:3], labels=labels)
    with pytest.raises(DataError, match="3 images but 4 labels"):
        load_splits(Data(dataset="arrays", path="short.npz"), tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{dataset: arrays}", "needs path"),
        ("{dataset: arrays, path: x.npz, image_size: 8}", "takes its images as they are"),
        ("{dataset: 'mydata:load', path: x}", "path and image_size belong to"),
        ("{dataset: cifar101}", "did you mean cifar10"),
        ("{dataset: 'mydata:'}", "module:callable"),
    ],
)
def test_keys_that_do_not_fit_the_data_set_are_mistakes(tmp_path, data: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(f"data: {data}\n")
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "x.yaml")


def test_a_function_of_ones_own_is_a_data_set_whose_runs_reproduce(
    tmp_path, monkeypatch, settings, tracking
) -> None:
    (tmp_path / "my_digits.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sweep = tiny_sweep()
    data = sweep.data.model_copy(update={"dataset": "my_digits:load"})
    sweep = sweep.model_copy(update={"data": data})
    drain(run_sweep(sweep, settings, tracking, CPU))
    done = promote(tracking.study("tiny"), sweep.selection, settings, tracking, CPU)
    run = tracking.read(done.run_id)
    assert recipe_of(run, tracking).data.dataset == "my_digits:load"
    _, compared = drain(reproduce(done.run_id, settings, tracking, CPU))
    assert compared.identical
    assert json.loads(tracking.read_text(done.run_id, "input.json"))["classes"] == list(
        "0123456789"
    )


def test_where_a_function_of_ones_own_fails_its_line_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "broken_data.py").write_text(
        "def load():\n    return 1 / 0\n\ndef none():\n    pass\n"
    )
    with pytest.raises(DataError, match=r"ZeroDivisionError: .*broken_data\.py, line 2"):
        load_splits(Data(dataset="broken_data:load"))
    with pytest.raises(DataError, match="returned NoneType; return a dict"):
        load_splits(Data(dataset="broken_data:none"))
    with pytest.raises(DataError, match="AttributeError"):
        load_splits(Data(dataset="broken_data:absent"))
    with pytest.raises(DataError, match="No module named 'nowhere_at_all'"):
        load_splits(Data(dataset="nowhere_at_all:load"))


# --- torchvision's ---


def test_torchvisions_cifar100_is_read_from_its_own_files(tmp_path, monkeypatch) -> None:
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    names = [f"class {number}" for number in range(100)]
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    pixels = np.arange(200 * 3072, dtype=np.uint32).astype(np.uint8).reshape(200, 3072)
    for part in ("train", "test"):
        stored = {"data": pixels, "fine_labels": [number % 100 for number in range(200)]}
        (root / part).write_bytes(pickle.dumps(stored))
    data = Data(dataset="cifar100", validation_fraction=0.5)
    splits, test = load_splits(data, tmp_path), load_test(data, tmp_path)
    assert splits.train.classes == tuple(names)
    assert np.array_equal(splits.whole.images.numpy(), pixels.reshape(200, 3, 32, 32))
    assert len(test) == 200
    assert load_splits(data.model_copy(update={"channels": 1}), tmp_path).train.images.shape[1] == 1


def test_torchvisions_svhn_is_read_from_its_own_files(tmp_path, monkeypatch) -> None:
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    pixels = np.arange(40 * 3072, dtype=np.uint32).astype(np.uint8).reshape(40, 3, 32, 32)
    labels = np.array([1 + number % 10 for number in range(40)])  # 10 is the digit 0
    for part in ("train", "test"):
        stored = {"X": pixels.transpose(2, 3, 1, 0), "y": labels[:, None]}
        savemat(tmp_path / f"{part}_32x32.mat", stored)
    splits = load_splits(Data(dataset="svhn", validation_fraction=0.5), tmp_path)
    assert np.array_equal(splits.whole.images.numpy(), pixels)
    assert splits.whole.labels.tolist() == [(number + 1) % 10 for number in range(40)]
    assert splits.train.classes == tuple("0123456789")


def test_a_data_set_that_is_not_there_says_where_it_belongs(tmp_path) -> None:
    for name in ("cifar100", "svhn", "stl10", "usps", "emnist"):
        with pytest.raises(DataError, match=f"{name}: not in .*--data-dir"):
            load_splits(Data(dataset=name), tmp_path)
