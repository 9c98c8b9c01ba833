"""A folder of images, one sub-folder per class: what in it is an image, of which class and which
split.

    shots/cat/1.png …                          one piece: test and validation are cut off it
    shots/train/cat/1.png …  shots/test/cat/…  splits; Train, training, train_set, … are the same,
                                               as are those of test
    shots/train/…  shots/val/…  shots/test/…   val/ is the validation split (valid, dev, … too)

Folders below a class folder belong to it, in torchvision's order. Hidden and system files are
neither images nor classes. Links are followed, except back to what they stand in; each real file
counts once in a class.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kdexp.distill.images import DataError, is_image, shown

__all__ = ["Folder", "Role", "Sample", "images_below", "listed", "survey"]

Role = Literal["training", "validation", "test"]
NAMES = {
    "training": r"train(ing)?",
    "validation": r"(cross)?val(id|idation|idate)?|dev(el|elopment)?",
    "test": r"test(ing|s)?|eval(uation)?|holdout|heldout",
}
WORDS = "data|images?|imgs?|pictures?|photos?|samples?|splits?|dataset|set|folder"
SYSTEM = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "__macosx",
        "$recycle.bin",
        "system volume information",
        "@eadir",
    }
)
SHOWN = 5  # names in one message


@dataclass(frozen=True)
class Sample:
    """An image file and its class."""

    file: Path
    label: int


@dataclass(frozen=True)
class Folder:
    """An image folder as it stands on the disk; no image has been opened for its pixels."""

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[Role, Sequence[Sample]]
    """Those that it holds; 'training' always."""
    places: Mapping[Role, Path]
    left_out: Mapping[str, int]
    """How many files and folders, by suffix or by what they are."""

    def name(self, file: Path) -> str:
        """A file's name within the folder."""
        return shown(file.relative_to(self.root).as_posix())


def survey(root: Path, path: str) -> Folder:
    """What the image folder `root`, given as `path` in the recipe, holds. Raises DataError."""
    try:
        if not root.is_dir():
            raise DataError(
                f"data.path: no folder {shown(root)}; give --data-dir, or correct data.path"
            )
        return _survey(root, path)
    except OSError as error:
        raise DataError(
            f"{shown(error.filename or root)}: cannot be read: {error.strerror}"
        ) from None


def images_below(paths: Iterable[Path]) -> tuple[list[Path], dict[str, int]]:
    """These files, whatever they are called, and the images in these folders and all below, each
    once; how many others were left out, by suffix or by what they are.

    Raises DataError.
    """
    left_out, found = Counter[str](), dict[Path, None]()
    for path in paths:
        try:
            path.lstat()
            found |= dict.fromkeys(_images(path, path, left_out) if path.is_dir() else [path])
        except OSError as error:
            where = shown(error.filename or path)
            raise DataError(
                f"{where}: {error.strerror}; give image files, or folders of them"
            ) from None
    return list(found), dict(left_out)


def _survey(root: Path, path: str) -> Folder:
    left_out: Counter[str] = Counter()
    places = _places(root, left_out)
    by_split = {role: _classes(place, left_out) for role, place in places.items()}
    classes = by_split["training"]
    _same_classes(root, places, by_split)
    if len(classes) < 2:
        further = _deeper(places["training"], path) if places["training"] == root else ""
        raise DataError(
            f"{shown(root)}: only one class ({listed(classes)}); there is nothing to tell"
            f" apart{further}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {
        role: [
            Sample(file, numbers[name])
            for name, folder in found.items()
            for file in _images(folder, places[role], left_out)
        ]
        for role, found in by_split.items()
    }
    return Folder(root, tuple(classes), splits, places, dict(left_out))


# --- one level ---


@dataclass
class _Level:
    """What is seen of a folder: its sub-folders and files, in order, and which of both are
    links.
    """

    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    links: set[Path] = field(default_factory=set)


def _look(folder: Path, left_out: Counter[str] | None = None) -> _Level:
    """A folder without what is hidden or the system's."""
    level = _Level()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (
                entry.name.startswith(".")
                or entry.name.endswith("~")
                or entry.name.casefold() in SYSTEM
            ):
                if left_out is not None:
                    left_out["hidden"] += 1
                continue
            path, link = folder / entry.name, entry.is_symlink()
            folder_like = path.is_dir() if link else entry.is_dir(follow_symlinks=False)
            (level.folders if folder_like else level.files).append(path)
            if link:
                level.links.add(path)
    return level


def _role(folder: Path) -> Role | None:
    """Of which split a folder of this name is: 'Train', 'train_set', 'TEST-images', 'val'."""
    letters = "".join(
        each for each in unicodedata.normalize("NFKC", folder.name).casefold() if each.isalnum()
    )
    bare = re.sub(f"^({WORDS})+|({WORDS})+$", "", letters)
    return next((role for role, pattern in NAMES.items() if re.fullmatch(pattern, bare)), None)  # type: ignore[misc]


def _places(root: Path, left_out: Counter[str]) -> dict[Role, Path]:
    """The folder of each split; of a folder that comes in one piece, itself. Raises DataError."""
    here = _look(root)
    named = [folder for folder in here.folders if _role(folder)]
    others = [folder for folder in here.folders if not _role(folder)]
    splits = [folder for folder in named if _look(folder).folders]
    if not splits and (others or not named):
        return {"training": root}
    if len(splits) < len(named) and not others:
        flat = _names(folder for folder in named if folder not in splits)
        raise DataError(
            f"{shown(root)}: {flat} would be a split, and holds no class folders: give each split"
            " one sub-folder per class (or, if it is a class, another name)"
        )
    places: dict[Role, Path] = {}
    for folder in splits:
        role = _role(folder)
        assert role
        if role in places:
            raise DataError(
                f"{shown(root)}: both {_names([places[role], folder])} would be the {role} split;"
                " rename one"
            )
        places[role] = folder
    if "training" not in places or (others and len(places) == 1):
        _refuse_layout(root, places, others)
    _look(root, left_out)
    if beside := len(others) + len(named) - len(splits):
        left_out["beside the splits"] = beside
    return dict(sorted(places.items(), key=lambda pair: list(NAMES).index(pair[0])))


def _refuse_layout(root: Path, places: Mapping[Role, Path], others: Sequence[Path]) -> None:
    found = _names(places.values())
    if "training" in places:
        raise DataError(
            f"{shown(root)}: {found} holds class folders as a split does, but {_names(others)}"
            " beside it is none: put the classes of one split side by side, or give the test"
            " images a folder test/"
        )
    raise DataError(
        f"{shown(root)}: {found} would be a split, and there is no train/ beside it: rename the"
        f" folder of the training images to train, or, if {found} is a class, give it another name"
    )


def _classes(place: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Class folders by name. Raises DataError."""
    level = _look(place, left_out)
    if not level.folders:
        inside = "holds files but no class folders" if level.files else "is empty"
        raise DataError(
            f"{shown(place)}: {inside}; an image folder has one sub-folder per class: give the"
            " folder above those as data.path"
        )
    for file in level.files:
        left_out["in no class folder" if is_image(file) else _ending(file)] += 1
    found, seen = dict[str, Path](), set[str]()
    for folder in level.folders:
        name = shown(folder.name)
        if folder in level.links and _leads_back(
            os.path.realpath(folder), [os.path.realpath(place)]
        ):
            left_out["a link back"] += 1
            continue
        if _composed(name) in seen:
            raise DataError(
                f"{shown(place)}: two class folders have the same name, written in two ways:"
                f" {name}; rename one"
            )
        seen.add(_composed(name))
        found[name] = folder
    return found


def _composed(name: str) -> str:
    """The same text for both ways to write é, as one character or two."""
    return unicodedata.normalize("NFC", name)


def _same_classes(
    root: Path, places: Mapping[Role, Path], found: dict[Role, dict[str, Path]]
) -> None:
    """Every split must have the training split's classes, which then have its names. Raises
    DataError.
    """
    known = {_composed(name): name for name in found["training"]}
    for role, classes in found.items():
        found[role] = {known.get(_composed(name), name): path for name, path in classes.items()}
    every = sorted({name for classes in found.values() for name in classes})
    odd = []
    for name in every:
        having = [
            f"{shown(places[role].name)}/" for role, classes in found.items() if name in classes
        ]
        if len(having) < len(found):
            odd.append(f"{name} (in {' and '.join(having)})")
    if odd:
        folders = " and ".join(f"{shown(place.name)}/" for place in places.values())
        few = "only one of them has" if len(found) == 2 else "not all of them have"
        raise DataError(
            f"{shown(root)}: {folders} must hold the same class folders; {few}: {listed(odd)}"
        )


def _deeper(root: Path, path: str) -> str:
    """Where the class folders are instead, if they are further down."""
    place, level = root, _look(root)
    while len(level.folders) == 1 and not level.files:
        place = level.folders[0]
        level = _look(place)
    inner = [
        folder
        for folder in level.folders
        if any(is_image(file) for file in _look(folder).files) or _role(folder)
    ]
    if place == root or len(inner) < 2:
        return ""
    there = shown((Path(path) / place.relative_to(root)).as_posix())
    return (
        f". The classes seem to be {_names(inner)} in {shown(place.name)}/: give that folder, --set"
        f" data.path={there}"
    )


# --- one class ---


def _images(folder: Path, place: Path, left_out: Counter[str]) -> list[Path]:
    """The image files of a class folder and all below it, in torchvision's order; what else is
    there is counted.
    """
    top = [os.path.realpath(folder), os.path.realpath(place)]
    todo, links, seen = [folder], list[Path](), set[str]()
    files, linked = dict[str, Path](), list[Path]()
    while todo or links:
        # first what really stands here, then what links lead to
        here = todo.pop() if todo else links.pop(0)
        real = os.path.realpath(here)
        if here != folder and (
            real in seen or _leads_back(real, [*top, os.path.realpath(here.parent)])
        ):
            left_out["a link back"] += 1
            continue
        seen.add(real)
        level = _look(here, left_out)
        for file in level.files:
            if not is_image(file):
                left_out[_ending(file)] += 1
            elif file in level.links:
                linked.append(file)
            else:
                # text, as realpath gives it
                files[os.path.join(real, file.name)] = file  # noqa: PTH118
        for inner in level.folders:
            (links if inner in level.links else todo).append(inner)
    for file in sorted(linked):
        if files.setdefault(os.path.realpath(file), file) != file:
            left_out["another link to the same file"] += 1
    return sorted(files.values(), key=lambda file: (str(file.parent), file.name))


def _leads_back(real: str, barred: Iterable[str]) -> bool:
    """Whether a folder is one of these, or holds one."""
    return any(each == real or each.startswith(real.rstrip(os.sep) + os.sep) for each in barred)


def _ending(file: Path) -> str:
    return shown(file.suffix.lower()) or "without a suffix"


def listed(names: Iterable[str]) -> str:
    """The first few of many names, and how many more."""
    every = list(names)
    return ", ".join(every[:SHOWN]) + (
        f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    )


def _names(folders: Iterable[Path | str]) -> str:
    return listed(
        f"{shown(folder.name if isinstance(folder, Path) else folder)}/" for folder in folders
    )
