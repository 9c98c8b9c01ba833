"""Data sets that come as arrays: a file of one's own, or what a function of one's own returns.

    keys                                               who writes them so
    train_images, train_labels, test_images, …         MedMNIST (val_images, val_labels: joined to
                                                       training; kdexp holds out its own)
    x_train, y_train, x_test, y_test                   Keras
    images, labels                                     one piece: a test split is cut off it
    classes                                            beside any of these: a name for each label

Images are (images, height, width), or with 1 or 3 channels, last or first: uint8, whole numbers of
0 to 255, or floats of 0 to 1. Labels are one for each image: numbers or names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdexp.distill.images import DataError, shown
from kdexp.own import load_own, own_line

__all__ = ["Arrays", "Raw", "arrays_in", "arrays_of", "train_and_test"]

Raw = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""Images of shape (images, channels, height, width), uint8; labels; their names."""
Arrays = Mapping[str, Any]
LAYOUTS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels", "", ""),
)
VALIDATION = ("val_images", "val_labels")


def arrays_in(place: Path) -> Arrays:
    """The arrays of an .npz file, or of a folder of .npy files, by name; no pickles. Raises
    DataError.
    """
    try:
        if place.is_dir():
            return {file.stem: np.load(file) for file in sorted(place.glob("*.npy"))}
        opened = np.load(place)
        if isinstance(opened, np.ndarray):
            raise DataError(
                f"{shown(place)}: holds one array without a name; give an .npz file, or the folder"
                " that it is in"
            )
        with opened:
            return {name: opened[name] for name in opened.files}
    except FileNotFoundError:
        raise DataError(
            f"{shown(place)}: no such file; data.path is looked for in the data folder (--data-dir)"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{shown(place)}: cannot be read as arrays of numbers ({why}); write it by numpy.savez"
        ) from None


def arrays_of(name: str) -> Arrays:
    """What a function of one's own, module:callable, returns: arrays by name. Raises DataError."""
    try:
        found = load_own(name)()
    except Exception as error:  # whatever people's own code raises
        where = own_line(error)
        raise DataError(
            f"data.dataset {name}: {type(error).__name__}: {error}{f' ({where})' if where else ''}"
        ) from None
    if not isinstance(found, Mapping):
        raise DataError(
            f"data.dataset {name}: returned {type(found).__name__}; return a dict of arrays, such"
            " as {'images': …, 'labels': …}"
        )
    return found


def train_and_test(arrays: Arrays, source: str) -> tuple[Raw, Raw | None]:
    """The training set, and the test set where there is one. Raises DataError, which names
    `source`.
    """
    layout = next((each for each in LAYOUTS if all(key in arrays for key in each[:2])), None)
    if layout is None:
        known = "; or ".join(" and ".join(each[:2]) for each in LAYOUTS)
        raise DataError(
            f"{source}: holds {', '.join(map(str, arrays)) or 'nothing'}; what is read is {known}"
        )
    parts = [(layout[0], layout[1])]
    if layout == LAYOUTS[0] and all(key in arrays for key in VALIDATION):
        parts.append(VALIDATION)
    images = np.concatenate([_images(arrays[image], f"{source}, {image}") for image, _ in parts])
    labels = np.concatenate([_labels(arrays[label], f"{source}, {label}") for _, label in parts])
    classes = _classes(arrays, labels)
    train = images, _numbers(labels, classes, arrays, source), classes
    if not layout[2] or layout[2] not in arrays or layout[3] not in arrays:
        return train, None
    test = _labels(arrays[layout[3]], f"{source}, {layout[3]}")
    pixels = _images(arrays[layout[2]], f"{source}, {layout[2]}")
    if pixels.shape[1:] != images.shape[1:]:
        raise DataError(
            f"{source}: test images are of shape {pixels.shape[1:]}, training images of"
            f" {images.shape[1:]}; make them alike"
        )
    return train, (pixels, _numbers(test, classes, arrays, source), classes)


def _images(given: Any, what: str) -> np.ndarray:
    found = np.asarray(given)
    if found.ndim == 3:
        found = found[:, None]
    elif found.ndim == 4 and found.shape[3] in (1, 3):
        found = found.transpose(0, 3, 1, 2)
    if found.ndim != 4 or found.shape[1] not in (1, 3):
        raise DataError(
            f"{what}: of shape {np.shape(given)}; give (images, height, width), or with 1 or 3"
            " channels"
        )
    if found.shape[2] != found.shape[3]:
        raise DataError(
            f"{what}: images of {found.shape[2]}x{found.shape[3]} pixels; make squares of them"
        )
    return np.ascontiguousarray(_eight_bits(found, what))


def _eight_bits(found: np.ndarray, what: str) -> np.ndarray:
    """As uint8: as it is, or from whole numbers of 0 to 255, or floats of 0 to 1."""
    if found.dtype == np.uint8 or not found.size:
        return found.astype(np.uint8)
    if found.dtype.kind not in "iufb":
        raise DataError(f"{what}: holds {found.dtype}; give uint8, 0 to 255")
    low, high = float(found.min()), float(found.max())
    if found.dtype.kind == "f" and low >= 0 and high <= 1:  # NaN is neither
        return np.rint(found * 255).astype(np.uint8)
    whole = found.dtype.kind in "iu" or bool((found == np.rint(found)).all())
    if not (low >= 0 and high <= 255 and whole):
        raise DataError(
            f"{what}: {found.dtype} of {low:g} to {high:g}; give uint8, 0 to 255, or floats of 0 to"
            " 1"
        )
    return found.astype(np.uint8)


def _labels(given: Any, what: str) -> np.ndarray:
    found = np.asarray(given)
    if found.ndim == 2 and found.shape[1] == 1:  # MedMNIST's
        found = found[:, 0]
    if found.ndim != 1:
        raise DataError(
            f"{what}: of shape {found.shape}; give one label for each image, a number or a name"
        )
    if found.dtype.kind == "f" and (found == np.rint(found)).all():
        found = found.astype(np.int64)
    if found.dtype.kind not in "iubUS":
        raise DataError(f"{what}: holds {found.dtype}; give whole numbers, or names")
    return found.astype(str) if found.dtype.kind == "S" else found


def _classes(arrays: Arrays, labels: np.ndarray) -> tuple[str, ...]:
    """Their names: as given, else the labels that there are, in order."""
    if "classes" in arrays:
        return tuple(str(name) for name in np.asarray(arrays["classes"]).tolist())
    return tuple(str(label) for label in np.unique(labels).tolist())


def _numbers(
    labels: np.ndarray, classes: tuple[str, ...], arrays: Arrays, source: str
) -> np.ndarray:
    """Labels as places in `classes`."""
    if "classes" in arrays and labels.dtype.kind != "U":
        return labels.astype(np.int64)
    places = {name: place for place, name in enumerate(classes)}
    unknown = sorted({str(label) for label in labels.tolist()} - places.keys())
    if unknown:
        raise DataError(
            f"{source}: labels that no training image has: {', '.join(unknown[:5])}; each class"
            " needs images to train on"
        )
    return np.array([places[str(label)] for label in labels.tolist()], np.int64)
