"""Image files are read as a person sees them, or refused with what stands against it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fed_diffusion.data.decode import BadImage, read_image

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # PNG's colour types
CHANNELS = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGBA: 4}
HIDDEN = (255, 0, 255)
"""A colour under transparency, which nobody sees."""


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def seen(path: Path, **options: Any) -> np.ndarray:
    """[H, W, 3] as it is read."""
    return np.asarray(read_image(path, **options).convert("RGB"))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(BadImage) as caught:
        read_image(path, **options)
    return str(caught.value)


def png(
    kind: int, depth: int, width: int, rows: list[bytes], *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG by its specification; Pillow writes none of the deep or transparent ones here."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def tiff(pixels: np.ndarray, *, extra: int | None = None, form: int = 1) -> bytes:
    """An uncompressed TIFF of [H, W, C]; `extra` says what the last channel is, `form` its type."""
    height, width, channels = pixels.shape
    bits = pixels.dtype.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    after = 8 + len(data)
    shorts = struct.pack(f"<{2 * channels}H", *[bits] * channels, *[form] * channels)
    tags = [(256, 1, width), (257, 1, height), (259, 1, 1), (262, 1, 2 if channels > 2 else 1)]
    tags += [(273, 1, 8), (277, 1, channels), (278, 1, height), (279, 1, len(data))]
    for tag, offset in ((258, after), (339, after + 2 * channels)):
        value = (
            offset
            if channels > 2
            else struct.unpack(
                "<I",
                struct.pack(
                    "<2H", *([bits if tag == 258 else form] * channels + [0] * (2 - channels))
                )[:4],
            )[0]
        )
        tags.append((tag, channels, value))
    if extra is not None:
        tags.append((338, 1, extra))
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, count, value)
        for tag, count, value in sorted(tags)
    )
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", after + len(shorts)) + data + shorts + directory


# --- orientation

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}
"""EXIF 2.3, tag 274: where the stored rows and columns belong."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_an_image_is_turned_as_its_exif_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = np.kron(noise(2, 2, seed=3), np.ones((8, 8), np.uint8))  # blocks that JPEG keeps
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    options = (
        {"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    )
    Image.fromarray(np.dstack([stored] * 3)).save(path, exif=exif, **options)
    error = np.abs(seen(path)[..., 0].astype(int) - TURNS[orientation](stored))
    assert error.max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_the_size_that_is_checked_and_told_is_that_of_the_upright_image(
    suffix: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(10, 16, 3)).save(path := tmp_path / f"a.{suffix}", exif=exif)
    assert refused(path, size=(16, 10)) == "is 10x16 pixels"
    assert read_image(path, size=(10, 16)).size == (10, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_leave_an_image_as_it_is_stored(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    for i, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12\0\x03")):
        Image.fromarray(pixels).save(path := tmp_path / f"{i}.png", exif=exif)
        assert np.array_equal(seen(path), pixels)


# --- transparency


def transparent_files(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """Every way to write two transparent, two opaque and two half-transparent pixels, or four."""
    colour = np.array([[HIDDEN, (10, 20, 30), (200, 100, 50)]] * 2, np.uint8)
    alpha = np.array([[0, 255, 128]] * 2, np.uint8)
    whole = np.dstack([colour, alpha])
    files: dict[str, tuple[Path, np.ndarray]] = {}

    def add(name: str, expected: np.ndarray, image: Image.Image | bytes, **options: Any) -> None:
        path = folder / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **options)
        files[name] = path, expected

    add("rgba.png", whole, Image.fromarray(whole))
    add("rgba.webp", whole, Image.fromarray(whole), lossless=True, exact=True)
    add("rgba.tiff", whole, tiff(whole, extra=2))
    premultiplied = np.dstack([(colour.astype(int) * alpha[..., None] // 255), alpha])
    add("premultiplied.tiff", whole, tiff(premultiplied.astype(np.uint8), extra=1))
    grey = np.dstack([colour[..., :1]] * 3 + [alpha])
    add("la.png", grey, Image.fromarray(np.dstack([colour[..., 0], alpha])))
    palette = Image.fromarray(np.array([[0, 1, 2]] * 2, np.uint8), "P")
    palette.putpalette(colour[0].tobytes())
    add("palette.png", whole, palette, transparency=bytes([0, 255, 128]))
    one = np.dstack([colour, np.array([[0, 255, 255]] * 2, np.uint8)])
    add("palette-one.png", one, palette, transparency=0)
    add("rgb-key.png", one, Image.fromarray(colour), transparency=HIDDEN)
    levels = np.array([[85, 0, 255]] * 2, np.uint8)
    keyed = np.dstack([levels] * 3 + [np.array([[0, 255, 255]] * 2, np.uint8)])
    add("grey-key.png", keyed, Image.fromarray(levels), transparency=85)
    row = bytes([0b01001100])  # the levels 1, 0, 3 of two bits
    add("grey-2-bits.png", keyed, png(GREY, 2, 3, [row] * 2, (b"tRNS", b"\0\1")))
    row = bytes([0b01010000, 0b11110000])
    add("grey-4-bits.png", keyed, png(GREY, 4, 3, [row] * 2, (b"tRNS", b"\0\5")))
    bilevel = np.array([[0, 255, 0]] * 2, np.uint8)
    keyed = np.dstack([bilevel] * 3 + [255 - bilevel])
    add("bilevel.png", keyed, png(GREY, 1, 3, [bytes([0b01000000])] * 2, (b"tRNS", b"\0\1")))
    return files


def test_an_image_with_transparent_pixels_needs_a_background(tmp_path: Path) -> None:
    for name, (path, _) in transparent_files(tmp_path).items():
        message = refused(path)
        assert "has transparent pixels and data.background is not set" in message, name
        assert "white or black" in message


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_transparent_pixels_show_the_background_and_never_what_is_under_them(
    background: str, level: int, tmp_path: Path
) -> None:
    for name, (path, expected) in transparent_files(tmp_path).items():
        share = expected[..., 3:] / 255
        composed = expected[..., :3] * share + level * (1 - share)
        error = np.abs(seen(path, background=background) - composed)
        # a premultiplied colour has lost a part of itself to rounding
        assert error.max() <= (1.5 if name == "premultiplied.tiff" else 0.5), name
        assert (seen(path, background=background)[expected[..., 3] == 0] == level).all(), name


def test_alpha_that_is_opaque_everywhere_is_dropped(tmp_path: Path) -> None:
    colour = noise(4, 4, 3)
    whole = np.dstack([colour, np.full((4, 4), 255, np.uint8)])
    Image.fromarray(whole).save(tmp_path / "a.png")
    Image.fromarray(whole).save(tmp_path / "a.webp", lossless=True)
    (tmp_path / "a.tiff").write_bytes(tiff(whole, extra=2))
    (tmp_path / "b.png").write_bytes(
        png(RGB, 8, 4, [row.tobytes() for row in colour], (b"tRNS", struct.pack(">3H", 1, 2, 3)))
    )
    for path in tmp_path.iterdir():
        assert np.array_equal(seen(path), colour), path.name
    grey = np.dstack([colour[..., 0], whole[..., 3]])
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png").convert("L")), grey[..., 0])


# --- depth


@pytest.mark.parametrize("kind", CHANNELS)
def test_png_files_of_16_bits_are_refused_in_every_colour_type(kind: int, tmp_path: Path) -> None:
    """Values up to 255 of 65,535, which Pillow's high byte makes black."""
    row = struct.pack(f">{2 * CHANNELS[kind]}H", *range(100, 100 + 2 * CHANNELS[kind]))
    (path := tmp_path / "a.png").write_bytes(png(kind, 16, 2, [row] * 2))
    assert "more than 8 bits per channel (16" in refused(path, background="white")


@pytest.mark.parametrize(
    ("dtype", "channels", "form", "says"),
    [
        ("uint16", 1, 1, "more than 8 bits per channel (16"),
        ("uint16", 3, 1, "more than 8 bits per channel (16"),
        ("uint16", 4, 1, "more than 8 bits per channel (16"),
        ("uint32", 1, 1, "more than 8 bits per channel (32"),
        ("float32", 1, 3, "signed or floating-point"),
        ("int8", 1, 2, "signed or floating-point"),
    ],
)
def test_tiff_files_of_other_values_than_unsigned_bytes_are_refused(
    dtype: str, channels: int, form: int, says: str, tmp_path: Path
) -> None:
    pixels = np.full((2, 2, channels), 100, dtype)
    (path := tmp_path / "a.tif").write_bytes(
        tiff(pixels, extra=2 if channels == 4 else None, form=form)
    )
    assert says in refused(path)


def test_files_of_at_most_8_bits_are_read_on_the_scale_of_8(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(GREY, 1, 2, [bytes([0b01000000])]))
    (tmp_path / "2.png").write_bytes(png(GREY, 2, 2, [bytes([0b00110000])]))
    (tmp_path / "4.png").write_bytes(png(GREY, 4, 2, [bytes([0x0F])]))
    (tmp_path / "8.png").write_bytes(png(GREY, 8, 2, [bytes([0, 255])]))
    (tmp_path / "8.tif").write_bytes(tiff(np.array([[[0], [255]]], np.uint8)))
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "1.tif")
    for path in tmp_path.iterdir():
        assert seen(path)[0, :, 0].tolist() == [0, 255], path.name


# --- frames, formats, colours


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_animations_and_several_pages_are_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)]
    frames[0].save(path := tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert "has 3 frames or pages" in refused(path)


def test_of_a_jpeg_with_several_pictures_the_main_one_is_read(tmp_path: Path) -> None:
    main, preview = Image.new("RGB", (8, 8), (200, 30, 30)), Image.new("RGB", (8, 8))
    main.save(path := tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert np.abs(seen(path).astype(int) - (200, 30, 30)).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000", "PPM"])
def test_another_format_under_the_name_of_one_that_is_read_is_refused(
    kind: str, tmp_path: Path
) -> None:
    """Of these neither depth nor frames are looked at, whatever the file is called."""
    Image.fromarray(noise(8, 8, 3)).save(path := tmp_path / "a.png", kind)
    assert "none of PNG, JPEG, BMP, WEBP, TIFF" in refused(path)


def test_a_format_is_told_by_what_is_inside(tmp_path: Path) -> None:
    Image.fromarray(pixels := noise(8, 8, 3)).save(path := tmp_path / "a.jpg", "PNG")
    assert np.array_equal(seen(path), pixels)


def test_cmyk_is_inverted_where_the_file_says_so_and_refused_where_it_does_not(
    tmp_path: Path,
) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path := tmp_path / "a.jpg", quality=100)
    assert np.abs(seen(path).astype(int) - (255, 0, 0)).max() <= 3
    content = path.read_bytes()
    start = content.index(b"\xff\xee")
    length = struct.unpack(">H", content[start + 2 : start + 4])[0]
    path.write_bytes(content[:start] + content[start + 2 + length :])
    assert "does not say whether it is inverted" in refused(path)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path := tmp_path / "a.tif")
    assert seen(path)[0, 0].tolist() == [255, 0, 0]


def test_colours_other_than_grey_rgb_and_cmyk_are_refused(tmp_path: Path) -> None:
    Image.new("LAB", (8, 8)).save(path := tmp_path / "a.tif")
    assert refused(path) == "is in the colour mode LAB; convert it to RGB"


def test_an_image_that_would_fill_the_memory_is_refused_undecoded(tmp_path: Path) -> None:
    rows = png(GREY, 8, 1, [b"\0"])
    huge = rows.replace(struct.pack(">II", 1, 1), struct.pack(">II", 60_000, 60_000), 1)
    crc = struct.pack(">I", zlib.crc32(huge[12:29]))
    (path := tmp_path / "a.png").write_bytes(huge[:29] + crc + huge[33:])
    assert "has too many pixels" in refused(path)
