"""A sweep file to begin with: one that comes with kdexp, or one made for a folder of images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from string import Template

from PIL import Image

from kdexp import KdexpError
from kdexp.config import name_for
from kdexp.distill.datasets import folds_of
from kdexp.distill.folders import Folder, listed, survey
from kdexp.distill.images import quietly
from kdexp.files import write_atomically
from kdexp.repeats import Plan
from kdexp.selection import check_reachable

__all__ = ["SHIPPED", "Begun", "begin", "shipped"]

SHIPPED = Path(__file__).parent / "sweeps"
SCHEMA, TEMPLATE = "sweep.schema.json", "folder.template"
LOOKED_AT = 500  # images whose size and colour stand for all
SIDES = (16, 24, 32, 48, 64)  # pixels; a step's cost grows with the square
GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})
BARS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
FEW = 50  # training images of a class
DATA_SETS = {"digits": "digits", "fashion-mnist": "fashion-mnist-quick"}
"""Its sweep file, by data set."""


@dataclass(frozen=True)
class Begun:
    """A sweep file that was written."""

    file: Path
    schema: Path
    said: tuple[str, ...] = ()
    """What was seen in a folder, a line each."""


def shipped() -> list[str]:
    """What `begin` has a sweep file for, besides folders."""
    return list(DATA_SETS)


def begin(what: str, output: Path | None = None) -> Begun:
    """Write a sweep file for a data set by name or for a folder of images, with the schema that
    editors complete and check it by. Nothing is overwritten. Raises KdexpError, DataError.
    """
    said: tuple[str, ...] = ()
    if what in DATA_SETS:
        text, name = (SHIPPED / f"{DATA_SETS[what]}.yaml").read_text("utf-8"), what
    elif Path(what).expanduser().is_dir():
        root = Path(what).expanduser().resolve()
        (text, said), name = _of_folder(survey(root, what)), root.name
    else:
        raise KdexpError(
            f"{what}: neither a folder of images nor one of {', '.join(shipped())}; give one of"
            " these, or a folder with a sub-folder for each class"
        )
    file = output or Path(f"{name}.yaml")
    if file.exists():
        raise KdexpError(f"{file}: there is one already; give another name with --output")
    if what in DATA_SETS:
        text = text.replace(f"sweeps/{DATA_SETS[what]}.yaml", str(file))
    write_atomically(file, lambda partial: partial.write_text(text, "utf-8"))
    schema = file.parent / SCHEMA
    content = (SHIPPED / SCHEMA).read_text("utf-8")
    write_atomically(schema, lambda partial: partial.write_text(content, "utf-8"))
    return Begun(file, schema, said)


@dataclass(frozen=True)
class _Seen:
    """What a folder's images are like."""

    side: int
    """Median of the shorter sides, in pixels."""
    grey: bool


def _of_folder(folder: Folder) -> tuple[str, tuple[str, ...]]:
    """A sweep file for a folder of images, and what it rests on."""
    seen = _look(folder)
    training = folder.splits["training"]
    counts = Counter(sample.label for sample in training)
    fewest = min(counts, key=lambda label: counts[label])
    count = len(training) if "test" in folder.splits else round(0.8 * len(training))
    held = 0.1 if count >= 5000 else 0.2
    side = max((each for each in SIDES if each <= seen.side), default=SIDES[0])
    said = (
        f"{len(training):,} training images of {len(folder.classes)} classes:"
        f" {listed(folder.classes)}",
        f"the smallest class is {folder.classes[fewest]}, {counts[fewest]:,} images"
        + (": too few to learn or to judge well" if counts[fewest] < FEW else ""),
        f"{'grey' if seen.grey else 'colour'}, {seen.side} pixels in the median: trained at"
        f" {side} x {side}",
        f"splits in the folder: {', '.join(folder.splits)}",
    )
    own = folder.splits.get("validation")
    bar = _bar(len(own), 1) if own else _bar(round(held * count), folds_of(held))
    text = Template((SHIPPED / TEMPLATE).read_text("utf-8")).substitute(
        name=_quoted(name_for(folder.root.name, "images")),
        path=_quoted(str(folder.root)),
        seen="\n".join(f"#   {line}" for line in said),
        side=side,
        channels=1 if seen.grey else 3,
        held=held,
        batch=128 if count >= 10_000 else 64 if count >= 2_000 else 32,
        epochs=5 if count >= 50_000 else 10 if count >= 10_000 else 20,
        bar=bar,
    )
    return text, said


def _look(folder: Folder) -> _Seen:
    """Open some images of each class for their size and colour. Raises KdexpError."""
    samples = folder.splits["training"]
    sides, modes = [], set()
    for sample in samples[:: max(1, len(samples) // LOOKED_AT)]:
        try:
            with quietly(), Image.open(sample.file) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except Exception:  # noqa: S112 - the sweep names each file that it cannot read
            continue
    if not sides:
        raise KdexpError(f"{folder.root}: none of its images can be read; see kdexp train")
    return _Seen(round(median(sides)), modes <= GREY)


def _bar(validation: int, folds: int) -> float:
    """The highest bar that repeats could be sure of with so many validation images."""
    for bar in BARS:
        try:
            check_reachable(Plan(bar, folds=folds), validation)
        except KdexpError:
            continue
        return bar
    return BARS[-1]


def _quoted(text: str) -> str:
    """As a YAML scalar that means this text, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"
