"""One image file: each mode and depth by its stated rule, as before where there was nothing wrong,
else refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from kdexp.distill.images import Unreadable, is_image, read

RANDOM = np.random.default_rng(8787)


def noise(*shape: int, most: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return RANDOM.integers(0, most, shape).astype(dtype)


def formerly(file: Path, size: int, channels: int) -> np.ndarray:
    """How images were read before there was a rule for each mode."""
    image = (
        Image.open(file)
        .convert("RGB")
        .convert("L" if channels == 1 else "RGB")
        .resize((size, size))
    )
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


def grey(file: Path, side: int = 16) -> np.ndarray:
    """As it is read, of its own size: no resizing."""
    return read(file, side, 1).pixels[0]


def coloured(file: Path, side: int = 16) -> np.ndarray:
    return read(file, side, 3).pixels.transpose(1, 2, 0)


def over_white(value: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    value, alpha = value.astype(float), alpha.astype(float)
    return np.rint((value * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)


def png(
    file: Path, rows: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]
) -> Path:
    """A PNG that Pillow would not write; `rows` are packed bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = rows.shape[1] * 8 // (depth * samples)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*each) for each in chunks)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )
    return file


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        (mode, suffix)
        for suffix in ("png", "jpg", "bmp", "tif", "gif", "webp", "ppm")
        for mode in ("L", "RGB", "1")
    ]
    + [("P", suffix) for suffix in ("png", "bmp", "tif", "gif", "webp")]
    + [("CMYK", suffix) for suffix in ("jpg", "tif")],
)
def test_what_was_read_rightly_before_gives_the_same_pixels(
    tmp_path: Path, mode: str, suffix: str, channels: int
) -> None:
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(37, 29, 3)).convert(mode).save(file)
    for size in (8, 29, 64):
        assert np.array_equal(read(file, size, channels).pixels, formerly(file, size, channels))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "tif"), ("I", "pgm")],
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, mode: str, suffix: str) -> None:
    values, file = noise(16, 16, most=65536, dtype=np.int64), tmp_path / f"x.{suffix}"
    values[0, :4] = 0, 257, 65535, 128
    as_stored = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    Image.frombytes(mode, (16, 16), values.astype(as_stored).tobytes()).save(file)
    picture = read(file, 16, 1)
    assert np.array_equal(picture.pixels[0], np.rint(values / 257))
    assert (picture.done, picture.top) == (frozenset({"16 bits"}), 65535)
    assert np.array_equal(coloured(file), np.rint(values / 257)[..., None].repeat(3, -1))


def test_sixteen_bits_are_made_eight_before_they_are_resized(tmp_path: Path) -> None:
    values = noise(40, 40, most=65536, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    eight = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(grey(tmp_path / "x.png", 8), np.asarray(eight.resize((8, 8))))


def test_one_bit_and_palettes_are_made_grey_or_colour_before_they_are_resized(
    tmp_path: Path,
) -> None:
    image = Image.fromarray(noise(40, 40)).convert("1")
    image.save(tmp_path / "x.png")
    assert np.array_equal(
        grey(tmp_path / "x.png", 8), np.asarray(image.convert("L").resize((8, 8)))
    )
    palette = Image.fromarray(noise(40, 40, 3)).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(
        coloured(tmp_path / "p.png", 8), np.asarray(palette.convert("RGB").resize((8, 8)))
    )


def test_sixteen_bit_colour_gives_its_upper_bytes(tmp_path: Path) -> None:
    values = noise(16, 16, 3, most=65536, dtype=np.dtype(">u2").type).astype(">u2")
    png(tmp_path / "x.png", values.view(np.uint8).reshape(16, -1), 16, 2)
    assert np.array_equal(coloured(tmp_path / "x.png"), values >> 8)


def test_tiffs_of_which_white_is_zero_are_turned_around(tmp_path: Path) -> None:
    values = noise(16, 16, most=65536, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert np.array_equal(grey(tmp_path / "x.tif"), np.rint((65535 - values.astype(int)) / 257))
    eight = noise(16, 16)
    Image.fromarray(eight).save(tmp_path / "y.tif")
    assert np.array_equal(grey(tmp_path / "y.tif"), eight)


@pytest.mark.parametrize(("low", "high"), [(-5, 70_000), (-1, 100), (0, 65_536)])
def test_whole_numbers_beyond_sixteen_bits_are_refused(tmp_path: Path, low: int, high: int) -> None:
    Image.fromarray(np.linspace(low, high, 256).reshape(16, 16).round().astype(np.int32)).save(
        tmp_path / "x.tif"
    )
    with pytest.raises(Unreadable, match="16 bits hold 0 to 65,535"):
        grey(tmp_path / "x.tif")


@pytest.mark.parametrize(("high", "factor"), [(1.0, 255), (0.3, 255), (255.0, 1), (7.5, 1)])
def test_floats_are_of_zero_to_one_or_to_255(tmp_path: Path, high: float, factor: int) -> None:
    values = np.linspace(0, high, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(grey(tmp_path / "x.tif"), np.rint(values * factor))
    assert read(tmp_path / "x.tif", 8, 1).done == {
        "float to 1" if factor == 255 else "float to 255"
    }


@pytest.mark.parametrize("wrong", [-0.1, 256.0, np.nan, np.inf, -np.inf, 1e30])
def test_other_floats_are_refused(tmp_path: Path, wrong: float) -> None:
    values = np.zeros((16, 16), np.float32)
    values[3, 3] = wrong
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(Unreadable, match="floats of|NaN or infinite"):
        grey(tmp_path / "x.tif")


# --- transparency ---


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("LA", "tif")],
)
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str, suffix: str) -> None:
    bands, file = noise(16, 16, len(mode)), tmp_path / f"x.{suffix}"
    bands[0, :4, -1] = 0, 255, 1, 254
    Image.fromarray(bands, mode).save(
        file, **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    expected = over_white(bands[..., :-1], bands[..., -1:])
    assert np.array_equal(coloured(file), np.broadcast_to(expected, (16, 16, 3)))
    assert read(file, 8, 1).done == {"transparent"}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_that_is_opaque_throughout_changes_nothing(
    tmp_path: Path, mode: str
) -> None:
    bands = noise(16, 16, len(mode))
    bands[..., -1] = 255
    Image.fromarray(bands, mode).save(tmp_path / "x.png")
    for channels in (1, 3):
        picture = read(tmp_path / "x.png", 8, channels)
        assert np.array_equal(picture.pixels, formerly(tmp_path / "x.png", 8, channels))
        assert not picture.done


def test_black_ink_on_nothing_is_black_on_white(tmp_path: Path) -> None:
    ink = noise(16, 16)
    drawing = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    drawing.putalpha(Image.fromarray(ink))
    drawing.save(tmp_path / "x.png")
    assert np.array_equal(grey(tmp_path / "x.png"), 255 - ink)


def test_a_palette_with_an_alpha_for_each_colour_or_with_one_transparent_colour(
    tmp_path: Path,
) -> None:
    palette = Image.fromarray(noise(16, 16, 3)).quantize(8)
    numbers = np.asarray(palette)
    colours = np.array(palette.getpalette()[:24], np.uint8).reshape(8, 3)
    alphas = np.array([0, 31, 64, 100, 128, 200, 254, 255], np.uint8)
    palette.save(tmp_path / "x.png", transparency=alphas.tobytes())
    assert np.array_equal(
        coloured(tmp_path / "x.png"), over_white(colours, alphas[:, None])[numbers]
    )
    palette.save(tmp_path / "y.png", transparency=3)
    one = np.where(np.arange(8) == 3, 0, 255)
    assert np.array_equal(coloured(tmp_path / "y.png"), over_white(colours, one[:, None])[numbers])
    palette.save(tmp_path / "z.gif", transparency=3)
    assert np.array_equal(coloured(tmp_path / "z.gif"), over_white(colours, one[:, None])[numbers])


def test_a_transparent_colour_of_an_image_without_alpha(tmp_path: Path) -> None:
    rgb, grey8 = noise(16, 16, 3), noise(16, 16)
    rgb[2, 5] = rgb[9, 1] = 10, 20, 30
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(10, 20, 30))
    white = (rgb == (10, 20, 30)).all(-1, keepdims=True)
    assert np.array_equal(coloured(tmp_path / "rgb.png"), np.where(white, 255, rgb))
    Image.fromarray(grey8).save(tmp_path / "l.png", transparency=int(grey8[4, 4]))
    assert np.array_equal(grey(tmp_path / "l.png"), np.where(grey8 == grey8[4, 4], 255, grey8))
    deep = noise(16, 16, most=65536, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "i.png", transparency=int(deep[4, 4]))
    assert np.array_equal(
        grey(tmp_path / "i.png"), np.where(deep == deep[4, 4], 255, np.rint(deep / 257))
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_transparent_grey_of_few_bits_is_of_so_few_bits(tmp_path: Path, depth: int) -> None:
    rows = noise(16, 2 * depth)
    values = np.unpackbits(rows, axis=1).reshape(16, 16, depth) @ (2 ** np.arange(depth)[::-1])
    most = 2**depth - 1
    png(tmp_path / "x.png", rows, depth, 0, (b"tRNS", struct.pack(">H", 1)))
    assert np.array_equal(
        grey(tmp_path / "x.png"), np.where(values == 1, 255, values * 255 // most)
    )


def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    file = png(tmp_path / "x.png", noise(16, 96), 16, 2, (b"tRNS", struct.pack(">HHH", 0, 0, 0)))
    with pytest.raises(Unreadable, match="alpha channel"):
        coloured(file)


# --- colours, turns, frames ---


def test_lab_becomes_srgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(noise(16, 16, 3) // 2 + 64)
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "x.tif")
    # 8-bit LAB is that coarse
    assert np.abs(coloured(tmp_path / "x.tif").astype(int) - np.asarray(rgb)).max() <= 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((48, 32), np.uint8)
    upright[:24, :16], upright[:24, 16:], upright[24:, :16] = 240, 160, 80
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(file, exif=exif, quality=100)
    got = grey(file, 8).astype(int)
    assert np.abs(got[[1, 1, 6, 6], [1, 6, 1, 6]] - [240, 160, 80, 0]).max() <= 3
    # Pillow turns TIFFs by itself
    assert ("turned" in read(file, 8, 1).done) == (orientation > 1 and suffix != "tif")


def test_a_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(noise(16, 16))
    image.save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert np.array_equal(grey(tmp_path / "x.png"), np.asarray(image))


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png", "avif"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    first, other = Image.new("RGB", (16, 16), (200, 200, 200)), Image.new("RGB", (16, 16))
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[other, first])
    picture = read(tmp_path / f"x.{suffix}", 16, 1)
    assert abs(int(picture.pixels.min()) - 200) <= 3
    assert "frames" in picture.done


# --- what is an image, and what is wrong with it ---


@pytest.mark.parametrize(
    "name",
    [
        "x.jfif",
        "x.JPG",
        "x.JPG.png",
        "x.gif",
        "x.AVIF",
        "x.webp",
        "x.tiff",
        "x.jp2",
        "x.bmp",
        "x",
        "x.1",
        "x.jpg_large",
        "IMG 2024.05.01",
    ],
)
def test_every_ending_that_pillow_reads_is_an_image_and_content_decides_where_there_is_none(
    tmp_path: Path, name: str
) -> None:
    image = Image.fromarray(noise(16, 16))
    kind = {"jfif": "JPEG", "jpg": "JPEG", "tiff": "TIFF", "jp2": "JPEG2000"}.get(
        name.rpartition(".")[2].lower()
    )
    known = (
        name.rpartition(".")[2].upper()
        if name.rpartition(".")[2].lower() in ("gif", "avif", "webp", "bmp")
        else "PNG"
    )
    image.save(tmp_path / name, format=kind or known)
    assert is_image(tmp_path / name)
    assert np.abs(grey(tmp_path / name).astype(int) - np.asarray(image)).mean() < 20


@pytest.mark.parametrize(
    "name",
    ["x.txt", "x.csv", "README", "x.pdf", "x.h5", "x.mpg", "x.eps", "x.npy", "x.2", "notes.md"],
)
def test_other_files_are_no_images(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("P1 II* some text")
    assert not is_image(tmp_path / name)


@pytest.mark.parametrize("name", ["x.cr2", "x.nef", "x.dng", "x.txt"])
def test_a_suffix_of_another_kind_is_believed(tmp_path: Path, name: str) -> None:
    """Cameras' raw files begin as a TIFF, whose first image is a preview."""
    Image.fromarray(noise(16, 16)).save(tmp_path / name, "TIFF")
    assert not is_image(tmp_path / name)


def test_an_image_under_another_images_ending_is_read_by_its_content(tmp_path: Path) -> None:
    image = Image.fromarray(noise(16, 16))
    image.save(tmp_path / "x.jpg", format="PNG")
    assert np.array_equal(grey(tmp_path / "x.jpg"), np.asarray(image))


def test_noise_under_an_images_ending_is_not_taken_for_a_format_without_a_signature(
    tmp_path: Path,
) -> None:
    """TGA begins with nothing of its own: almost any bytes could be one."""
    Image.fromarray(noise(16, 16)).save(tmp_path / "x.tga")
    (tmp_path / "x.tga").rename(tmp_path / "x.png")
    with pytest.raises(Unreadable, match="no image that can be read"):
        grey(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"no picture", "no image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "damaged|no image"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Unreadable, match=said):
        grey(tmp_path / "x.png")


def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(Unreadable, match="not a file"):
        grey(tmp_path / "x.png")


def test_a_huge_image_is_refused_with_what_is_allowed_and_one_of_a_hundred_megapixels_is_read(
    tmp_path: Path, recwarn
) -> None:
    head = struct.pack(">II", 14200, 14200)
    file = png(tmp_path / "x.png", noise(16, 16), 8, 0)
    content = bytearray(file.read_bytes())
    content[16:24] = head
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    file.write_bytes(content)
    with pytest.raises(Unreadable, match="201,640,000 pixels, 178,956,970 are allowed"):
        grey(file)
    Image.new("1", (10000, 10000), 1).save(tmp_path / "y.png")
    assert (grey(tmp_path / "y.png", 8) == 255).all()
    assert not recwarn.list


def test_signed_bytes_and_floats_of_which_white_is_zero_are_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(16, 16)).save(tmp_path / "x.tif", tiffinfo={339: 2})
    with pytest.raises(Unreadable, match="signed"):
        grey(tmp_path / "x.tif")
