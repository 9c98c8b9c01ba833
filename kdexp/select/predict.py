"""What a trained student says of images from anywhere: for each the two likeliest classes by name.

Images are read and prepared by the code that read the training images. No split is touched; of runs
recorded by earlier versions, which do not hold their class names, the training images are read for
them.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from kdexp.config import Recipe, Variant
from kdexp.distill.datasets import DataError, Split
from kdexp.distill.folders import images_below, listed
from kdexp.distill.images import Picture, Unreadable, shown
from kdexp.distill.inputs import blank, open_image, probabilities
from kdexp.distill.inspection import Seen, seen_of, what_was_done
from kdexp.files import write_output
from kdexp.runs.records import input_of, recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.select.students import student_named
from kdexp.select.variants import load_variant, splits_of
from kdexp.settings import Settings

__all__ = [
    "Prediction",
    "Predictions",
    "Reading",
    "input_like",
    "predict",
    "write_csv",
]

BATCH = 64  # images at once: of 224x224 pixels 39 MB


@dataclass(frozen=True)
class Prediction:
    """The two likeliest classes of an image, and their probabilities, 0 to 1. A row of the CSV."""

    path: str
    """As it was given, or found below a folder that was."""
    label: str
    probability: float
    second_label: str
    second_probability: float


@dataclass(frozen=True)
class Predictions:
    """What was said of all images, and what of them could not be read."""

    run_id: str
    variant: Variant
    classes: tuple[str, ...]
    rows: tuple[Prediction, ...]
    unreadable: tuple[str, ...]
    """Path and reason."""
    left_out: Mapping[str, int]
    """Files and folders within the folders that are no images, by suffix or by what they are."""
    notes: tuple[str, ...]
    """What was done to some images: scaled from 16 bits, laid over white, …"""

    @property
    def counts(self) -> dict[str, int]:
        """How many images of each class, in the order of the classes, without those of none."""
        found = Counter(row.label for row in self.rows)
        return {name: found[name] for name in self.classes if found[name]}


@dataclass(frozen=True)
class Reading:
    """How far it is."""

    done: int
    total: int


def predict(
    name: str, paths: Sequence[Path], settings: Settings, tracking: Tracking, device: torch.device
) -> Generator[Reading, None, Predictions]:
    """Let the student of a run (its ID, or models:/NAME@ALIAS) look at image files and at all
    images below folders; yields how far it is.

    What cannot be read is named and the rest is done. Raises KdexpError where nothing can be.
    """
    run, variant = student_named(name, "predict", tracking)
    files, left_out = images_below(paths)
    if not files:
        raise DataError(
            f"{listed(map(shown, paths))}: no image there{_left_out(left_out)}; give image files,"
            " or folders of them"
        )
    recipe = recipe_of(run, tracking)
    like = input_like(run, recipe, settings, tracking).to(device)
    module = load_variant(run, recipe, variant, like, tracking).to(device)
    rows, unreadable, seen = list[Prediction](), list[str](), list[Seen]()
    for start in range(0, len(files), BATCH):
        pictures = dict[Path, Picture]()
        for file in files[start : start + BATCH]:
            try:
                pictures[file] = open_image(file, recipe.data, like)
            except Unreadable as why:
                unreadable.append(f"{shown(file)} {why}")
        seen += map(seen_of, pictures.values())
        rows += _answers(module, pictures, like)
        yield Reading(min(start + BATCH, len(files)), len(files))
    if not rows:
        raise DataError(
            f"None of {len(files):,} images can be read: {listed(unreadable)}; give images that"
            " open elsewhere"
        )
    return Predictions(
        run.run_id,
        variant,
        like.classes,
        tuple(rows),
        tuple(unreadable),
        left_out,
        tuple(what_was_done(seen)),
    )


def write_csv(done: Predictions, file: Path) -> None:
    """A row for each image that was read, under a header, in UTF-8; whole or not at all. Raises
    KdexpError.
    """

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as opened:
            table = csv.writer(opened, lineterminator="\n")
            table.writerow(field.name for field in fields(Prediction))
            table.writerows(
                [f"{cell:.6f}" if isinstance(cell, float) else cell for cell in astuple(row)]
                for row in done.rows
            )

    write_output("--out", file, write, shown)


def input_like(run: RunRecord, recipe: Recipe, settings: Settings, tracking: Tracking) -> Split:
    """Two images of the form that a run's student takes, with its class names. Raises
    KdexpError.
    """
    recorded = input_of(run, tracking)
    if recorded:
        return blank(recorded, recipe.data)
    try:
        return splits_of(run, recipe, settings).train.take(torch.arange(2))
    except DataError as error:
        raise DataError(
            f"Run {run.run_id} was recorded by a former version of kdexp, without its class names:"
            f" they are those of its training images, and {error}"
        ) from None


def _answers(
    module: nn.Module, pictures: Mapping[Path, Picture], like: Split
) -> Iterator[Prediction]:
    if not pictures:
        return
    found = probabilities(module, list(pictures.values()), like)
    for file, first in zip(pictures, zip(*found.topk(2), strict=True), strict=True):
        (one, other), (label, second) = (part.tolist() for part in first)
        yield Prediction(shown(file), like.classes[label], one, like.classes[second], other)


def _left_out(kinds: Mapping[str, int]) -> str:
    return f" (left out: {listed(f'{n:,} {kind}' for kind, n in kinds.items())})" if kinds else ""
