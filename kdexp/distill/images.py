"""One image file as 8-bit pixels, by a stated rule for every mode of Pillow's; what has no rule is
refused, never guessed.

    mode                          becomes
    1, L, RGB, RGBX               as it is (1 bit: black and white)
    P, CMYK, YCbCr, HSV           RGB, as Pillow converts them
    LAB                           sRGB, from D50
    16-bit grey (I;16…, I)        value / 257, rounded; 12-bit grey: value · 255 / 4095; beyond 16
                                  bits: refused
    16-bit colour                 the upper 8 bits: Pillow gives no more
    F                             values of 0 to 1 times 255, or values of 0 to 255, rounded;
                                  others, NaN: refused
    any with transparency         laid over white

Of several frames the first is taken, it is turned as EXIF says, made grey or RGB, and only then
resized (bicubic). Colour profiles and gamma are not applied. An 8-bit grey or RGB image thus gives
what Pillow's `convert` and `resize` give.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from kdexp import KdexpError

__all__ = ["DataError", "Picture", "Unreadable", "is_image", "png_of", "quietly", "read", "shown"]

BY_CONTENT = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000")
"""Known by their first bytes, whatever the file is called. The others are believed under their own
suffix only.
"""
NOT_READ = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""What Pillow only recognises, or hands to another program, or whose values have no stated
range.
"""
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # TIFF's tags
# a PNG's transparent grey is a value of so few bits; Pillow scales the pixels only
KEY_STEPS = {"L;2": 85, "L;4": 17}


class DataError(KdexpError):
    """A dataset that is missing, corrupt or unusable."""


class Unreadable(Exception):
    """Why a file is no image with a rule, without the file's name."""


@dataclass(frozen=True)
class Picture:
    """An image as it is trained on, and what was done to it that its owner should hear of."""

    pixels: np.ndarray
    """uint8 of shape (channels, size, size)."""
    done: frozenset[str]
    """'transparent', 'turned', 'frames', '16 bits', 'float to 1', 'float to 255'."""
    top: int = 0
    """Of 16 bits, the largest value."""


def read(file: Path, size: int, channels: int) -> Picture:
    """An image file as a square of `size` pixels. Raises Unreadable."""
    try:
        return _read(file, size, channels)
    except Unreadable:
        raise
    except Exception as error:  # each of Pillow's decoders fails in its own way at damaged files
        raise Unreadable(_reason(error, file)) from None


def png_of(pixels: np.ndarray[Any, np.dtype[np.uint8]], longest: int) -> bytes:
    """8-bit pixels, (1 or 3, height, width), as a PNG file, no side of it longer than `longest`."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    image.thumbnail((longest, longest))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def is_image(file: Path) -> bool:
    """Whether a file counts as an image: by its suffix, or, where what follows the last dot is
    none, by its first bytes.

    One that counts must be readable. Others are none, whatever is in them.
    """
    suffix = file.suffix.lower()
    # not: 'x', 'x.1', 'x.jpg_large'
    if suffix in _formats() or (suffix[1:2].isalpha() and suffix[1:].isalnum()):
        return suffix in _formats()
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return False
        with quietly(), Image.open(file, formats=BY_CONTENT):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever it is, it does not open as an image
        return False


@contextmanager
def quietly() -> Iterator[None]:
    """In here Pillow neither warns nor logs: what matters is raised, or said by us."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _libtiff_unheard() -> Iterator[None]:
    """libtiff writes its complaints to the process's standard error itself; what matters of them
    Pillow raises.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def shown(name: str | Path) -> str:
    """A file's name as text in one line that UTF-8 can encode, whatever bytes it is made of."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


@cache
def _formats() -> dict[str, str]:
    """Suffix → format, of all that Pillow reads here."""
    Image.init()
    opened = {**{name: name for name in Image.OPEN}, "MPO": "JPEG"}  # MPO is opened as a JPEG
    every = Image.registered_extensions().items()
    return {
        suffix: opened[name] for suffix, name in every if name in opened and name not in NOT_READ
    }


def _read(file: Path, size: int, channels: int) -> Picture:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("is not a file")
    if status.st_size == 0:
        raise Unreadable("is empty")
    own = _formats().get(file.suffix.lower())
    formats = list(dict.fromkeys([*([own] if own else []), *BY_CONTENT]))
    with quietly(), Image.open(file, formats=formats) as image:
        raw = _raw_mode(image)  # `load` forgets it
        with _libtiff_unheard() if image.format == "TIFF" else nullcontext():
            image.load()
        if not all(image.size):
            raise Unreadable("has no pixels")
        plain, done, top = _eight_bits(image, raw)
        if (turn := TURNS.get(_orientation(image))) is not None:  # one of them is 0
            plain, done = plain.transpose(turn), done | {"turned"}
        if _animated(image):
            done |= {"frames"}
    square = plain.convert("L" if channels == 1 else "RGB").resize((size, size))
    return Picture(np.asarray(square).reshape(size, size, -1).transpose(2, 0, 1), done, top)


def _eight_bits(image: Image.Image, raw: str) -> tuple[Image.Image, frozenset[str], int]:
    """The image in L or RGB, what was done to it, and of 16 bits the largest value."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(SAMPLE_FORMAT, (1,))[0] == 2 and image.mode == "L":
        raise Unreadable("holds signed 8-bit values, which have no rule: save it as unsigned ones")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image, raw, white_is_0=tags.get(PHOTOMETRIC) == 0)
    if image.mode == "F":
        if tags.get(PHOTOMETRIC) == 0:
            raise Unreadable(
                "holds floats of which 0 is white, which have no rule: save it with 0 as black"
            )
        return _from_floats(image)
    if image.mode == "LAB":
        return _from_lab(image), frozenset(), 0
    if image.has_transparency_data:
        plain, alpha = _opaque_and_alpha(image, raw)
        return *_over_white(plain, alpha), 0
    if image.mode in ("1", "L"):
        return image.convert("L"), frozenset(), 0
    if image.mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB"), frozenset(), 0
    raise Unreadable(f"has the mode {image.mode}, which has no rule: save it as RGB")


def _from_16_bits(
    image: Image.Image, raw: str, white_is_0: bool
) -> tuple[Image.Image, frozenset[str], int]:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unreadable(
            f"holds whole numbers of {low:,} to {high:,}, and 16 bits hold 0 to 65,535: save it"
            " with these"
        )
    transparent = values == image.info["transparency"] if "transparency" in image.info else None
    most = 4095 if raw == "I;12" else 65535
    if white_is_0:
        values = most - values
    plain = Image.fromarray(((values * 510 + most) // (2 * most)).astype(np.uint8))
    done, top = (frozenset({"16 bits"}), high) if most == 65535 else (frozenset(), 0)
    if transparent is not None:
        plain, more = _over_white(
            plain, Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))
        )
        done |= more
    return plain, done, top


def _from_floats(image: Image.Image) -> tuple[Image.Image, frozenset[str], int]:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise Unreadable("holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise Unreadable(
            f"holds floats of {low:g} to {high:g}: only 0 to 1, or 0 to 255, have a rule"
        )
    done = frozenset({"float to 1" if high <= 1 else "float to 255"} if high > 0 else {})
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)), done, 0


def _from_lab(image: Image.Image) -> Image.Image:
    made = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert made is not None
    return made


def _opaque_and_alpha(image: Image.Image, raw: str) -> tuple[Image.Image, Image.Image]:
    """The image without its transparency, in L or RGB, and how opaque each pixel is."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    key = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB") and key is not None:
        plain = image.convert("RGB" if image.mode == "RGB" else "L")
        if "16" in raw:
            raise Unreadable(
                "has 16-bit colours of which one is transparent, which has no rule: give it an"
                " alpha channel"
            )
        values = np.asarray(plain)
        equal = values == np.asarray(key) * KEY_STEPS.get(raw, 1)
        return plain, Image.fromarray(
            np.where(equal.all(-1) if image.mode == "RGB" else equal, 0, 255).astype(np.uint8)
        )
    coloured = image.convert("RGBA")
    return coloured.convert("RGB"), coloured.getchannel("A")


def _over_white(plain: Image.Image, alpha: Image.Image) -> tuple[Image.Image, frozenset[str]]:
    """value · alpha / 255 + 255 − alpha, rounded."""
    if alpha.getextrema() == (255, 255):
        return plain, frozenset()
    white = Image.new(plain.mode, plain.size, "white")
    white.paste(plain, mask=alpha)
    return white, frozenset({"transparent"})


def _raw_mode(image: Image.Image) -> str:
    """How the file holds its pixels, where Pillow says so: 'RGB;16B', 'L;4'."""
    tile = getattr(image, "tile", None)
    how = tile[0][3] if tile else ""
    return str(how[0] if isinstance(how, tuple) and how else how)


def _orientation(image: Image.Image) -> int:
    """As EXIF has it. A damaged EXIF turns nothing."""
    with suppress(Exception):
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    return 1


def _animated(image: Image.Image) -> bool:
    """Whether there are more frames. What is damaged behind the first does not matter."""
    with suppress(Exception):
        return bool(getattr(image, "is_animated", False))
    return False


def _reason(error: Exception, file: Path) -> str:
    """A decoder's failure in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        found = f"{int(pixels[1]):,}" if pixels else "too many"
        return f"has {found} pixels, {most:,} are allowed: scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "is no image that can be read here"
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = shown(" ".join(str(error).replace(str(file), "it").split()))[:200]
    return f"is damaged: {said or type(error).__name__}"
