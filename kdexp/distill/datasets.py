"""Data sets as tensors: a split is one uint8 tensor on the training device, known by its
SHA-256.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from kdexp.config import Data
from kdexp.distill.arrays import Raw, arrays_in, arrays_of, train_and_test
from kdexp.distill.folders import Folder, Role, Sample, listed, survey
from kdexp.distill.images import DataError, shown
from kdexp.distill.inspection import Inspection, inspect
from kdexp.surroundings import expanded

__all__ = [
    "DataError",
    "Inspection",
    "Split",
    "Splits",
    "count_test",
    "folds_of",
    "load_example",
    "load_splits",
    "load_test",
    "made_grey",
    "stratified",
]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
# MD5 of the unpacked files: archives of the same content differ in their gzip headers.
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


@dataclass(frozen=True)
class Split:
    """Images, labels and how pixels become floats: x = (pixel / 255 - mean) / std on `channels`
    channels.
    """

    images: UInt8[Tensor, "samples stored_channels height width"]
    labels: Int64[Tensor, " samples"]
    classes: tuple[str, ...]
    channels: int
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of shape, pixels, labels and class names."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def take(self, samples: Int64[Tensor, " some"]) -> Split:
        """The split of these samples only."""
        return replace(self, images=self.images[samples], labels=self.labels[samples])

    def to(self, device: torch.device) -> Split:
        """The same on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """What a search may see. The test split is not here: `load_test` reads it, once, for the
    selected model.
    """

    train: Split
    validation: Split
    inspection: Inspection | None = None
    """Of an image folder: what was read, of all its splits."""
    folds: int = 1
    """How many folds there are to hold out."""
    kept: Int64[Tensor, " kept"] | None = None
    """Where in the whole training set the training images are ..."""
    held: Int64[Tensor, " held"] | None = None
    """... and where those of validation. None where these were not cut here."""

    def to(self, device: torch.device) -> Splits:
        """The same on `device`."""
        kept, held = (
            places if places is None else places.to(device) for places in (self.kept, self.held)
        )
        train, validation = self.train.to(device), self.validation.to(device)
        return replace(self, train=train, validation=validation, kept=kept, held=held)

    @property
    def whole(self) -> Split:
        """All images of training and validation in the order of the whole training set: a copy."""
        kept, held = self._places
        count = 1 + int(torch.cat([kept, held]).max())
        if len(kept) == count:
            return self.train
        images = self.train.images.new_empty(count, *self.train.images.shape[1:])
        labels = self.train.labels.new_empty(count)
        for places, part in ((kept, self.train), (held, self.validation)):
            images[places], labels[places] = part.images, part.labels
        return replace(self.train, images=images, labels=labels)

    def cut_by(self, data: Data) -> Splits:
        """The same images, cut as `data` says: equal to `load_splits(data)`, but no file is read.

        `data` differs from that of these splits in `fold` and `train_on_validation` only. Raises
        DataError.
        """
        (_, held), whole = self._places, self.whole
        if self.folds > 1:
            held = _held_out(whole, data)
        _check_fold(data, self.folds)
        return _cut_whole(whole, held, data, self.folds)

    @property
    def _places(self) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
        if self.kept is None or self.held is None:
            raise ValueError("only splits out of load_splits can be cut in another way")
        return self.kept, self.held


def load_splits(
    data: Data, data_dir: Path | None = None, device: torch.device | None = None
) -> Splits:
    """The training set, cut into train and validation (or, with `train_on_validation`, whole).
    Raises DataError.

    Of an image folder the test images are opened too, so that a broken one is found now and not
    after a sweep.
    """
    if data.dataset == "image_folder":
        splits = _folder_splits(data, data_dir)
    else:
        whole, _ = _train_and_test(data, data_dir, test=False)
        splits = _cut_whole(whole, _held_out(whole, data), data, folds_of(data.validation_fraction))
    return splits.to(device) if device else splits


def load_test(
    data: Data, data_dir: Path | None = None, device: torch.device | None = None
) -> Split:
    """The test split. Nothing in a search may call this. Raises DataError."""
    if data.dataset == "image_folder":
        folder = _folder(data, data_dir)
        test = _read(folder, {"test": _cut_folder(folder, data).test}, data)
    else:
        _, found = _train_and_test(data, data_dir, test=True)
        assert found is not None
        test = found
    return test.to(device) if device else test


def count_test(data: Data, splits: Splits, data_dir: Path | None = None) -> int:
    """How many test images there are; none is looked at. Raises DataError."""
    if splits.inspection:
        return splits.inspection.counts["test"]
    _, test = _train_and_test(data, data_dir, test=True)
    assert test is not None
    return len(test)


def load_example(data: Data, data_dir: Path | None = None) -> Split:
    """Two training images: what a network's input is like. Raises DataError."""
    if data.dataset == "image_folder":
        folder = _folder(data, data_dir)
        cut = _cut_folder(folder, data)
        first = cut.kept[:2] if not data.train_on_validation else range(2)
        return _read(folder, {"training": [cut.fit[number] for number in first]}, data)
    return load_splits(data, data_dir).train.take(torch.arange(2))


def folds_of(fraction: float) -> int:
    """How many folds there are, where fold 0 is this share and the others cut the rest evenly."""
    return max(int(1 / fraction + 1e-9), 1)


def stratified(
    labels: Int64[Tensor, " samples"], fraction: float, seed: int, classes: int, fold: int = 0
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
    """Sample numbers kept and held out, in order. Fold 0 holds `fraction` of each class, rounded,
    at least one.

    What is not in fold 0 is dealt out to the other folds: each sample is in one of them, and their
    sizes, in all and of each class, differ by one at most. Raises DataError where a class has fewer
    than two samples, or the fold none.
    """
    generator = torch.Generator().manual_seed(seed)
    others, dealt = max(folds_of(fraction) - 1, 1), 0
    folds, labels = torch.zeros(len(labels), dtype=torch.int64), labels.cpu()
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(
                f"class {label} has {len(members)} samples; a stratified split needs at least 2 of"
                " each class"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        rest = members[torch.randperm(len(members), generator=generator)[count:]]
        folds[rest] = 1 + (dealt + torch.arange(len(rest))) % others
        dealt += len(rest)
    held = folds == fold
    if not held.any():
        raise DataError(
            f"data.fold: {len(labels):,} images leave none for fold {fold}; choose one of folds 0"
            f" to {int(folds.max())}"
        )
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _held_out(whole: Split, data: Data) -> Int64[Tensor, " held"]:
    """Which images of the whole training set a fold holds out. Raises DataError."""
    _check_fold(data, folds_of(data.validation_fraction))
    fraction, seed = data.validation_fraction, data.split_seed
    return stratified(whole.labels, fraction, seed, len(whole.classes), data.fold)[1]


def _check_fold(data: Data, folds: int) -> None:
    if data.fold < folds:
        return
    cut = folds == folds_of(data.validation_fraction)
    why = (
        f"data.validation_fraction is {data.validation_fraction:g}"
        if cut
        else "the folder has a validation split of its own"
    )
    there = f"are {folds} folds, 0 to {folds - 1}" if folds > 1 else "is one fold, 0"
    raise DataError(
        f"data.fold: got {data.fold}, but there {there}, as {why}; set data.fold to one of them"
    )


def _cut_whole(whole: Split, held: Int64[Tensor, " held"], data: Data, folds: int) -> Splits:
    """The whole training set, cut into train (or, with `train_on_validation`, whole) and
    validation.
    """
    held = held.to(whole.labels.device)
    kept = _training(len(whole), held, data)
    train = whole if data.train_on_validation else whole.take(kept)
    return Splits(train, whole.take(held), None, folds, kept, held)


def _training(count: int, held: Int64[Tensor, " held"], data: Data) -> Int64[Tensor, " kept"]:
    """Which of so many images are trained on."""
    kept = torch.ones(count, dtype=torch.bool, device=held.device)
    kept[held] = data.train_on_validation
    return kept.nonzero().flatten()


# --- reading -----------------------------------------------------------------------------------

TORCHVISION: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "emnist": (
        "EMNIST",
        {"split": "balanced", "train": True},
        {"split": "balanced", "train": False},
    ),
    "usps": ("USPS", {"train": True}, {"train": False}),
}
"""torchvision's class of a data set, and how it is asked for training and for test."""


def _train_and_test(data: Data, data_dir: Path | None, test: bool) -> tuple[Split, Split | None]:
    """The training set, and the test set if asked for (or where it must be cut from the whole
    anyway).
    """
    folder = data_dir or Path("data")
    if data.dataset == "digits":
        return _cut(_split(_digits(), data), data)
    if data.dataset == "arrays" or data.own:
        return _own(data, folder)
    name = data.dataset
    if name in TORCHVISION:
        read: Callable[[bool], Raw] = lambda train: _torchvision(  # noqa: E731
            name, folder, data_dir is None, train
        )
    else:
        read = lambda train: _mnist_like(name, folder, data_dir is not None, train)  # noqa: E731
    return _split(read(True), data), _split(read(False), data) if test else None


def _own(data: Data, folder: Path) -> tuple[Split, Split]:
    """Training and test set out of arrays of one's own."""
    if data.own:
        arrays, source = arrays_of(data.dataset), f"data.dataset {data.dataset}"
    else:
        place = folder / expanded(str(data.path))
        arrays, source = arrays_in(place), shown(place)
    train, test = train_and_test(arrays, source)
    whole = _split(train, data)
    return _cut(whole, data) if test is None else (whole, _split(test, data))


def _cut(whole: Split, data: Data) -> tuple[Split, Split]:
    """Training and test set out of a dataset that comes in one piece."""
    kept, held = stratified(whole.labels, data.test_fraction, data.split_seed, len(whole.classes))
    return whole.take(kept), whole.take(held)


def _split(raw: Raw, data: Data) -> Split:
    images, labels, classes = raw
    if data.channels == 1 and images.shape[1] == 3:
        images = made_grey(images)
    if len(images) != len(labels):
        raise DataError(
            f"{data.dataset}: {len(images):,} images but {len(labels):,} labels; fetch the files"
            " again"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"{data.dataset}: labels must be 0 to {len(classes) - 1}; fetch the files again"
        )
    if len(classes) < 2:
        raise DataError(
            f"{data.dataset}: only one class ({', '.join(classes)}); there is nothing to tell apart"
        )
    return Split(
        torch.tensor(images),
        torch.tensor(labels, dtype=torch.int64),
        classes,
        data.channels,
        data.mean,
        data.std,
    )


def made_grey(
    images: UInt8[np.ndarray, "samples 3 height width"],
) -> UInt8[np.ndarray, "samples 1 height width"]:
    """Coloured images of a data set in grey: ITU-R 601's luma, rounded."""
    luma = images.transpose(0, 2, 3, 1) @ np.array([0.299, 0.587, 0.114])
    return np.round(luma)[:, None].astype(np.uint8)


def _digits() -> Raw:
    from sklearn.datasets import load_digits  # 1 s to import: only where it is used

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return images, digits.target, tuple(str(digit) for digit in range(10))


def _mnist_like(name: str, folder: Path, only_folder: bool, train: bool) -> Raw:
    from torchvision import datasets

    kind = {
        "fashion_mnist": datasets.FashionMNIST,
        "mnist": datasets.MNIST,
        "kmnist": datasets.KMNIST,
    }[name]
    # All four, whichever are read now: a missing test file should not be found out after a whole
    # sweep.
    every = [
        f"{part}-{content}"
        for part in ("train", "t10k")
        for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    stems = every[:2] if train else every[2:]
    places = [folder / kind.__name__ / "raw", folder]
    if name == "fashion_mnist" and not only_folder:
        places.append(DEBIAN)
    found = next((place for place in places if all(_idx_file(place, stem) for stem in every)), None)
    if found is None:
        if only_folder:
            raise DataError(
                f"{name}: not all of {', '.join(every)} (or .gz) are in {places[0]} or {folder}; "
                "correct --data-dir (KDEXP_DATA_DIR), or leave it out to download"
            )
        _download(lambda: kind(folder, train=train, download=True), name, folder)
        found = places[0]
    md5s = {file.removesuffix(".gz"): md5 for file, md5 in kind.resources}
    images, labels = (_read_idx(_idx_file(found, stem), name, stem, md5s[stem]) for stem in stems)
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(
            f"{found}: images have {images.ndim} dimensions and labels {labels.ndim}, expected 3"
            " and 1"
        )
    return images[:, None], labels, tuple(kind.classes)


def _idx_file(place: Path, stem: str) -> Path | None:
    return next((file for file in (place / f"{stem}.gz", place / stem) if file.is_file()), None)


def _read_idx(file: Path | None, name: str, stem: str, archive_md5: str) -> np.ndarray:
    """An idx file of unsigned bytes, packed or not. MD5: Fashion-MNIST's content, the others'
    archive.
    """
    assert file is not None
    again = (
        "delete it and fetch it again (torchvision's download, or the package that owns"
        f" {file.parent})"
    )
    try:
        stored = file.read_bytes()
        content = gzip.decompress(stored) if file.suffix == ".gz" else stored
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}; {again}") from None
    except Exception as error:  # zlib.error derives from Exception
        raise DataError(f"{file}: corrupt archive: {error}; {again}") from None
    checked, expected = (
        (content, FASHION_MNIST_MD5[stem]) if name == "fashion_mnist" else (stored, archive_md5)
    )
    md5 = hashlib.md5(checked, usedforsecurity=False).hexdigest()
    if md5 != expected and (name == "fashion_mnist" or file.suffix == ".gz"):
        raise DataError(f"{file}: corrupt: MD5 {md5}, expected {expected}; {again}")
    dimensions = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if not dimensions or len(content) != start + math.prod(shape):
        raise DataError(f"{file}: not an idx file of unsigned bytes (or cut short); {again}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _torchvision(name: str, folder: Path, download: bool, train: bool) -> Raw:
    from torchvision import datasets

    kind, for_training, for_test = TORCHVISION[name]
    asked = for_training if train else for_test
    make = getattr(datasets, kind)
    dataset = _download(lambda: make(folder, download=download, **asked), name, folder)
    images = np.asarray(dataset.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.transpose(0, 3, 1, 2)
    labels = np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets)
    digits = tuple(str(digit) for digit in range(10))  # of house numbers and postcodes
    return images, labels, tuple(getattr(dataset, "classes", digits))


def _download(make: Callable[[], object], name: str, folder: Path):  # type: ignore[no-untyped-def]
    """What torchvision makes of it, its failures in one line and its chatter unheard."""
    from contextlib import redirect_stdout
    from io import StringIO

    try:
        with redirect_stdout(StringIO()):
            return make()
    except (OSError, RuntimeError) as error:
        hint = (
            " or install the Debian package dataset-fashion-mnist"
            if name == "fashion_mnist"
            else ""
        )
        first = str(error).splitlines()[0]
        raise DataError(
            f"{name}: not in {folder}, and not to be had ({first}); "
            f"put its files into a folder in torchvision's layout and pass --data-dir{hint}"
        ) from None


# --- image folders ---


@dataclass(frozen=True)
class _Cut:
    """An image folder's samples: those to fit with, which of them are for training and which are
    held out, and test's.
    """

    fit: list[Sample]
    kept: Int64[Tensor, " kept"]
    held: Int64[Tensor, " held"]
    folds: int
    test: list[Sample]


def _folder(data: Data, data_dir: Path | None) -> Folder:
    return survey((data_dir or Path("data")) / expanded(str(data.path)), str(data.path))


def _folder_splits(data: Data, data_dir: Path | None) -> Splits:
    folder = _folder(data, data_dir)
    cut = _cut_folder(folder, data)
    parts: dict[Role, list[Sample]] = {
        "training": [cut.fit[number] for number in cut.kept],
        "validation": [cut.fit[number] for number in cut.held],
        "test": cut.test,
    }
    images, inspection = inspect(
        folder, parts, _size(data), data.channels, keep=("training", "validation")
    )
    train, validation = (
        _labelled(images.pop(role), parts[role], folder, data)
        for role in ("training", "validation")
    )
    if data.train_on_validation:
        order = torch.cat([cut.kept, cut.held]).argsort()
        joined = (
            torch.cat([train.images, validation.images])[order],
            torch.cat([train.labels, validation.labels])[order],
        )
        train = replace(train, images=joined[0], labels=joined[1])
    said = replace(inspection, notes=(*_cut_off(folder, data), *inspection.notes))
    kept = _training(len(cut.fit), cut.held, data)
    return Splits(train, validation, said, cut.folds, kept, cut.held)


def _read(folder: Folder, part: dict[Role, list[Sample]], data: Data) -> Split:
    (role,) = part
    images, _ = inspect(folder, part, _size(data), data.channels, keep=(role,))
    return _labelled(images[role], part[role], folder, data)


def _image_folder(root: Path, data: Data) -> Raw:
    """All training images of a folder as they stand, before anything is cut off them."""
    folder = survey(root, str(data.path))
    whole = _read(folder, {"training": list(folder.splits["training"])}, data)
    return whole.images.numpy(), whole.labels.numpy(), whole.classes


def _labelled(images: np.ndarray, samples: list[Sample], folder: Folder, data: Data) -> Split:
    return Split(
        torch.from_numpy(images),
        _labels(samples),
        folder.classes,
        data.channels,
        data.mean,
        data.std,
    )


def _labels(samples: Sequence[Sample]) -> Int64[Tensor, " samples"]:
    return torch.tensor([sample.label for sample in samples], dtype=torch.int64)


def _size(data: Data) -> int:
    return int(data.image_size or 0)


def _cut_folder(folder: Folder, data: Data) -> _Cut:
    """Its splits; what it does not hold is cut off the training split, first test, then validation.
    Raises DataError.
    """
    _check_enough(folder)
    train, classes = list(folder.splits["training"]), len(folder.classes)
    test = list(folder.splits.get("test", ()))
    if not test:
        kept, held = stratified(_labels(train), data.test_fraction, data.split_seed, classes)
        train, test = [train[number] for number in kept], [train[number] for number in held]
    if validation := list(folder.splits.get("validation", ())):
        numbers = torch.arange(len(train) + len(validation))
        _check_fold(data, 1)
        every, many = [*train, *validation], len(train)
        return _Cut(every, numbers[:many], numbers[many:], 1, test)
    _check_fold(data, folds := folds_of(data.validation_fraction))
    fraction, seed = data.validation_fraction, data.split_seed
    kept, held = stratified(_labels(train), fraction, seed, classes, data.fold)
    return _Cut(train, kept, held, folds, test)


def _check_enough(folder: Folder) -> None:
    """Every class needs an image in each split, and in training one more for each that is cut off
    it. Raises DataError.
    """
    missing = [role for role in ("validation", "test") if role not in folder.splits]
    lacking = []
    for role, samples in folder.splits.items():
        cut = missing if role == "training" else []
        counts = Counter(sample.label for sample in samples)
        why = f": one to train on, one each for {' and '.join(cut)}"
        for label, name in enumerate(folder.classes):
            if counts[label] <= len(cut):
                has = f"{counts[label] or 'no'} image{'s' * (counts[label] != 1)}"
                lacking.append(
                    f"class '{name}' has {has} in {shown(folder.places[role])} and needs"
                    f" {1 + len(cut)}{why * bool(cut)}"
                )
    if lacking:
        left = (
            f" (left out: {listed(f'{n} {kind}' for kind, n in folder.left_out.items())})"
            if folder.left_out
            else ""
        )
        raise DataError(
            f"{'; '.join(lacking[:3])}{f'; and {len(lacking) - 3} more' * (len(lacking) > 3)}{left}"
        )


def _cut_off(folder: Folder, data: Data) -> list[str]:
    """What is said of splits that a folder with splits has, or lacks."""
    if folder.places["training"] == folder.root:
        return []
    train = f"{shown(folder.places['training'].name)}/"
    said = []
    if "validation" in folder.places:
        said.append(
            f"validation is {shown(folder.places['validation'].name)}/; data.validation_fraction"
            " has no effect"
        )
    if "test" not in folder.places:
        said.append(
            f"there is no test/: {data.test_fraction:.0%} of {train} are set apart as test"
            " (data.test_fraction)"
        )
    return said
