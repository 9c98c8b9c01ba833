"""Every image of a folder opened once, before anything is trained: what cannot be read is named,
what was read is said.

Equal images of two splits, or under two labels, are counted, by their pixels as they are trained
on. Each image's digest is kept by its file's name, so that a study can tell later which images are
others.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kdexp.distill.folders import Folder, Role, Sample, listed
from kdexp.distill.images import DataError, Picture, Unreadable, read, shown

__all__ = ["Inspection", "Seen", "changed", "inspect", "seen_of", "what_was_done"]

# of 16 bits: where no value is above, every image comes out in the darkest eighth of the scale
DARK = 8192
DONE = {
    "transparent": "laid over white where transparent",
    "turned": "turned as EXIF says",
    "frames": "of several frames: the first is taken",
    "16 bits": "of 16 bits: scaled to 8 (value / 257)",
    "float to 1": "of floats from 0 to 1: times 255",
    "float to 255": "of floats from 0 to 255: rounded",
}


@dataclass(frozen=True)
class Seen:
    """What is kept of an image that was opened."""

    digest: str
    done: frozenset[str]
    top: int


@dataclass(frozen=True)
class Inspection:
    """What was read of an image folder."""

    counts: Mapping[Role, int]
    classes: int
    left_out: Mapping[str, int]
    notes: tuple[str, ...]
    digests: Mapping[str, str]
    """Of each image's pixels as they are trained on, by its file's name within the folder."""

    def __str__(self) -> str:
        parts = ", ".join(f"{count:,} {role}" for role, count in self.counts.items())
        left = sum(self.left_out.values())
        kinds = ", ".join(
            f"{count:,} {kind}"
            for kind, count in sorted(self.left_out.items(), key=lambda pair: (-pair[1], pair[0]))
        )
        said = f"{sum(self.counts.values()):,} images ({parts}), {self.classes} classes"
        return said + (f", {left:,} left out: {kinds}" if left else "")


def inspect(
    folder: Folder,
    splits: Mapping[Role, Sequence[Sample]],
    size: int,
    channels: int,
    keep: Collection[Role],
) -> tuple[dict[Role, np.ndarray], Inspection]:
    """The pixels of the splits to `keep`, uint8 of shape (samples, channels, size, size), and what
    was read of all.

    Raises DataError, which names the files that cannot be read.
    """
    pixels = _room({role: len(splits[role]) for role in keep}, size, channels)
    seen: dict[Role, list[Seen]] = {role: [] for role in splits}
    broken: list[str] = []
    for role, samples in splits.items():
        for place, sample in enumerate(samples):
            try:
                if role in keep:
                    picture = read(sample.file, size, channels)
                    pixels[role][place] = picture.pixels
                    seen[role].append(seen_of(picture))
                else:
                    seen[role].append(_glance(sample.file, _stamp(sample.file), size, channels))
            except Unreadable as why:
                broken.append(f"{shown(sample.file)} ({role} split) {why}")
    if broken:
        many = f"{len(broken):,} images cannot be read: " if len(broken) > 1 else ""
        raise DataError(
            f"{many}{'; '.join(broken[:3])}{'; …' * (len(broken) > 3)}. Mend them or take them away"
        )
    every = [
        (sample, role, each)
        for role in splits
        for sample, each in zip(splits[role], seen[role], strict=True)
    ]
    _check_ranges([(sample.file, each) for sample, _, each in every])
    notes = (*what_was_done([each for *_, each in every]), *_equals(folder, every))
    counts = {role: len(samples) for role, samples in splits.items()}
    digests = {folder.name(sample.file): each.digest for sample, _, each in every}
    return pixels, Inspection(counts, len(folder.classes), folder.left_out, notes, digests)


def _room(counts: Mapping[Role, int], size: int, channels: int) -> dict[Role, np.ndarray]:
    """Arrays for so many images. Raises DataError."""
    try:
        return {
            role: np.empty((count, channels, size, size), np.uint8)
            for role, count in counts.items()
        }
    except MemoryError:
        gigabytes = sum(counts.values()) * channels * size**2 / 1e9
        raise DataError(
            f"{sum(counts.values()):,} images of {size} x {size} pixels take {gigabytes:,.0f} GB of"
            " memory, which are not there: lower data.image_size"
        ) from None


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of these images, digests by name, is not as it was: '2 added (a.png, b.png), 1 removed
    (c.png)'; else nothing.
    """
    gone = [name for name in then if name not in now]
    new = [name for name in now if name not in then]
    by_digest = {then[name]: name for name in reversed(gone)}
    renamed = {name: by_digest.pop(now[name]) for name in new if now[name] in by_digest}
    lists = {
        "renamed": [f"{old} → {name}" for name, old in renamed.items()],
        "added": [name for name in new if name not in renamed],
        "removed": [name for name in gone if name not in renamed.values()],
        "with other pixels": [name for name in now if then.get(name, now[name]) != now[name]],
    }
    return ", ".join(
        f"{len(names):,} {what} ({listed(names)})" for what, names in lists.items() if names
    )


def seen_of(picture: Picture) -> Seen:
    """What is kept of it."""
    return Seen(
        hashlib.blake2b(picture.pixels.tobytes(), digest_size=8).hexdigest(),
        picture.done,
        picture.top,
    )


# the test split is looked over again whenever the others are read; the stamp tells where a file has
# changed
@cache
def _glance(file: Path, stamp: tuple[int, ...], size: int, channels: int) -> Seen:
    return seen_of(read(file, size, channels))


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be opened") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_ranges(every: Sequence[tuple[Path, Seen]]) -> None:
    """What only all images together tell: a scale must be the same for each of them."""
    deep = [(file, each) for file, each in every if "16 bits" in each.done]
    top = max((each.top for _, each in deep), default=0)
    if 0 < top <= 255:
        raise DataError(
            f"{shown(deep[0][0])} has 16 bits and values up to {top} only, as has every such image"
            " here: of 65,535 that is black. Save them with 8 bits, or spread their values"
        )
    kinds = {
        kind: next((file for file, each in every if kind in each.done), None)
        for kind in ("float to 1", "float to 255")
    }
    if all(kinds.values()):
        one, other = map(shown, kinds.values())  # type: ignore[arg-type]
        raise DataError(
            f"{one} holds floats of 0 to 1, {other} up to 255: which scale do they share? Save all"
            " with the same, or 8 bits"
        )


def what_was_done(every: Sequence[Seen]) -> Iterator[str]:
    """What was done to some of these images, in words with their number."""
    counts = Counter(done for each in every for done in each.done)
    for done, text in DONE.items():
        if counts[done]:
            yield f"{counts[done]:,} {text}"
    top = max((each.top for each in every if "16 bits" in each.done), default=DARK)
    if 0 < top < DARK:
        yield (
            f"the largest value of 16 bits is {top:,}, of 65,535: these images are dark; spread"
            " their values if that is wrong"
        )


def _equals(folder: Folder, every: Sequence[tuple[Sample, Role, Seen]]) -> Iterator[str]:
    """Equal images where they mislead: in two splits, or under two labels."""
    groups: dict[str, list[tuple[Sample, Role]]] = defaultdict(list)
    for sample, role, seen in every:
        groups[seen.digest].append((sample, role))
    several = [group for group in groups.values() if len(group) > 1]
    for role, why in (
        ("test", "test accuracy will flatter"),
        ("validation", "validation accuracy will flatter"),
    ):
        pairs = [(sample, twin) for group in several for sample, twin in _twins(group, role)]
        if pairs:
            yield (
                f"{_count(pairs, f'{role} image')} among the training images too,"
                f" {_example(folder, pairs)}: {why}"
            )
    labelled = [(group[0][0], other) for group in several if (other := _otherwise_labelled(group))]
    if labelled:
        yield (
            f"{_count(labelled, 'image')} there under more than one label,"
            f" {_example(folder, labelled)}"
        )


def _twins(group: Sequence[tuple[Sample, Role]], role: str) -> Iterable[tuple[Sample, Sample]]:
    """The images of a split in a group of equal ones, each with one of training."""
    twin = next((sample for sample, other in group if other == "training"), None)
    return [(sample, twin) for sample, other in group if other == role] if twin else []


def _otherwise_labelled(group: Sequence[tuple[Sample, Role]]) -> Sample | None:
    return next((sample for sample, _ in group if sample.label != group[0][0].label), None)


def _count(pairs: Sequence[object], what: str) -> str:
    return f"1 {what} is" if len(pairs) == 1 else f"{len(pairs):,} {what}s are"


def _example(folder: Folder, pairs: Sequence[tuple[Sample, Sample]]) -> str:
    one, other = pairs[0]
    return f"pixel for pixel: {folder.name(one.file)} is {folder.name(other.file)}"
