"""Image files of every mode and format, whole and damaged: read by the stated rule, or refused in a
few words.

What is expected of whole files is computed here from the values that were written, not by Pillow's
conversions.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdexp.config import Data
from kdexp.distill.datasets import DataError, load_splits
from kdexp.distill.images import Picture, Unreadable, is_image, read

EXACT = {
    "1": ("PNG", "TIFF", "BMP", "GIF", "PPM"),
    "L": ("PNG", "TIFF", "BMP", "GIF", "PPM", "TGA", "PCX", "SGI"),
    "LA": ("PNG", "TIFF", "TGA"),
    "P": ("PNG", "TIFF", "BMP", "GIF", "TGA", "PCX"),
    "RGB": ("PNG", "TIFF", "BMP", "PPM", "TGA", "PCX", "SGI", "QOI", "ICO"),
    "RGBA": ("PNG", "TIFF", "TGA", "SGI", "QOI", "DDS"),
    "I;16": ("PNG", "TIFF", "PPM"),
    "I": ("TIFF", "PPM"),
    "F": ("TIFF", "PFM"),
    "CMYK": ("TIFF",),
}
LOSSY = [
    ("L", "JPEG"),
    ("RGB", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "WEBP"),
    ("RGBA", "WEBP"),
    ("RGB", "AVIF"),
    ("L", "JPEG2000"),
]
WHOLE = [(mode, kind) for mode, kinds in EXACT.items() for kind in kinds] + LOSSY
SUFFIX = {"PFM": ".pfm", "PPM": ".ppm", "TIFF": ".tif", "JPEG2000": ".jp2", "JPEG": ".jpg"}
DAMAGE = (
    "none",
    "cut",
    "flipped",
    "zeroed",
    "empty",
    "text",
    "repeated",
    "head",
    "other suffix",
    "garbage",
    "inserted",
)
SIDE = 16


def made(mode: str, kind: str, draw: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A file, and what it must become as RGB."""
    values = draw.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
    grey = values[..., 0].astype(float)
    colour = values[..., :3].astype(float)
    alpha = values[..., 3:].astype(float)
    match mode:
        case "1":
            image, becomes = Image.fromarray(values[..., 0] > 127), 255.0 * (values[..., :1] > 127)
        case "L":
            image, becomes = Image.fromarray(values[..., 0]), grey[..., None]
        case "LA":
            image = Image.fromarray(values[..., [0, 3]])
            becomes = (grey[..., None] * alpha + 255 * (255 - alpha)) / 255
        case "P":
            palette = draw.integers(0, 256, (256, 3)).astype(np.uint8)
            image = Image.fromarray(values[..., 0]).convert("P")
            becomes = palette[values[..., 0]].astype(float)
            image.putpalette(palette.tobytes())
        case "RGB":
            image, becomes = Image.fromarray(values[..., :3]), colour
        case "RGBA":
            image, becomes = Image.fromarray(values), (colour * alpha + 255 * (255 - alpha)) / 255
        case "I;16" | "I":
            deep = draw.integers(0, 65536, (SIDE, SIDE))
            image = Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.int32))
            becomes = deep[..., None] / 257
        case "F":
            share = draw.random((SIDE, SIDE), np.float32)
            image, becomes = Image.fromarray(share), (share * 255)[..., None].astype(float)
        case _:
            image = Image.frombytes("CMYK", (SIDE, SIDE), values.tobytes())
            inks = values.astype(float)
            becomes = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    file = io.BytesIO()
    image.save(file, "PPM" if kind == "PFM" else kind)
    return file.getvalue(), np.rint(np.broadcast_to(becomes, (SIDE, SIDE, 3)))


def damaged(content: bytes, how: str, draw: np.random.Generator) -> bytes:
    data = bytearray(content)
    match how:
        case "cut":
            return bytes(data[: draw.integers(0, len(data))])
        case "flipped":
            for _ in range(int(draw.integers(1, 9))):
                data[draw.integers(0, len(data))] ^= 1 << draw.integers(0, 8)
        case "zeroed":
            at = int(draw.integers(0, len(data)))
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        case "empty":
            return b""
        case "text":
            return b"Not found. " * int(draw.integers(1, 50))
        case "repeated":
            return bytes(data + data)
        case "head":  # sizes and counts stand at the beginning: make them huge
            at = int(draw.integers(4, min(64, len(data))))
            data[at : at + 4] = (
                draw.integers(0, 256, 4).astype(np.uint8).tobytes()
                if draw.random() < 0.5
                else b"\xff\xff\xff\x7f"
            )
        case "garbage":
            return draw.integers(0, 256, int(draw.integers(1, 400))).astype(np.uint8).tobytes()
        case "inserted":
            at = int(draw.integers(0, len(data)))
            data[at:at] = draw.integers(0, 256, 7).astype(np.uint8).tobytes()
    return bytes(data)


def read_or_refused(file: Path) -> tuple[Picture | None, str]:
    try:
        return read(file, SIDE, 3), ""
    except Unreadable as why:
        return None, str(why)


def fuzz(rounds: int, folder: Path, seed: int, whole: bool) -> Counter[str]:
    """So many files; how many were read and refused, by kind of damage."""
    draw, ends = np.random.default_rng(seed), Counter[str]()
    for number in range(rounds):
        (mode, kind) = WHOLE[number % len(WHOLE)]
        how = "none" if whole else DAMAGE[number % len(DAMAGE)]
        content, becomes = made(mode, kind, draw)
        suffix = SUFFIX.get(kind, f".{kind.lower()}")
        if how == "other suffix":
            suffix = str(
                draw.choice([".png", ".jpg", ".gif", ".tif", ".tga", ".pcx", "", ".ico", ".JPEG"])
            )
        file = folder / f"{number}{suffix}"
        file.write_bytes(damaged(content, how, draw))
        is_image(file)
        picture, said = read_or_refused(file)
        if picture is None:
            assert said.isprintable()
            assert 0 < len(said) < 300
            ends[f"{how}: refused"] += 1
            continue
        assert (picture.pixels.shape, picture.pixels.dtype) == ((3, SIDE, SIDE), np.uint8)
        ends[f"{how}: read"] += 1
        if how == "none":
            apart = np.abs(picture.pixels.transpose(1, 2, 0).astype(float) - becomes)
            most = 1 if mode in ("RGBA", "LA", "CMYK") else 0  # rounded at other places
            if (mode, kind) not in LOSSY:
                assert apart.max() <= most, (mode, kind, apart.max())
            elif kind != "AVIF":  # whose 16 x 16 of noise is no picture
                assert apart.mean() < 80, (mode, kind, apart.mean())
        file.unlink()
    return ends


@pytest.mark.parametrize(
    ("rounds", "whole"),
    [(len(WHOLE), True), (220, False), pytest.param(2_200, False, marks=pytest.mark.slow)],
)
def test_image_files_whole_and_damaged_are_read_by_the_rule_or_refused(
    rounds, whole, tmp_path, capfd, caplog
) -> None:
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        ends = fuzz(rounds, tmp_path, rounds, whole)
    assert [str(each.message) for each in warned] == []
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert sum(ends.values()) == rounds
    assert not any(
        ends[f"{how}: {end}"]
        for how, end in (("none", "refused"), ("empty", "read"), ("text", "read"))
    )
    if not whole:
        assert len({each.partition(":")[0] for each in ends}) == len(DAMAGE)
        assert ends["flipped: read"] > 0 < ends["flipped: refused"]


def test_a_folder_of_damaged_images_is_refused_in_one_line_that_names_one_of_them(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(8787)
    for number in range(44):
        mode, kind = WHOLE[number % len(WHOLE)]
        how = DAMAGE[1 + number % (len(DAMAGE) - 1)]
        file = (
            tmp_path
            / "shots"
            / f"class {number % 2}"
            / f"{number}{SUFFIX.get(kind, f'.{kind.lower()}')}"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(damaged(made(mode, kind, draw)[0], how, draw))
    with pytest.raises(
        DataError,
        match=(
            r"images cannot be read: .*shots/class [01]/\d+\.\w+ \((training|validation|test)"
            r" split\) "
        ),
    ) as error:
        load_splits(Data(dataset="image_folder", path="shots", image_size=8), tmp_path)
    assert str(error.value).isprintable()
