"""One image file as a person sees it: upright, opaque, with 8 bits in each channel."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from fed_diffusion.config.schema import Background

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}
"""The formats that are read; of others, depth, frames and transparency are not checked here."""
EXTENSIONS = tuple(extension for group in FORMATS.values() for extension in group)
LEVELS = {"white": 255, "black": 0}
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _UNSIGNED = 258, 339, 1  # of TIFF 6.0


class BadImage(ValueError):
    """A file that cannot be used; the message goes on after the file's name."""


def read_image(
    source: Path | bytes, background: Background | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode a file, or the bytes of one, in full, turned as its EXIF or XMP orientation says.

    Colour profiles are not applied: the values are those in the file. CMYK becomes RGB by the plain
    formula. Of a JPEG with several pictures (MPO) the main one is read.

    Parameters
    ----------
    background
        What transparent pixels are laid over. Without one, an image with any pixel that is not
        opaque is refused: the colour under its transparency is arbitrary and nobody sees it.
    size
        (width, height) that the upright image must have; looked at before anything is decoded.

    Returns
    -------
    Image of mode L or RGB; grey files that have an alpha channel are RGB too.

    Raises
    ------
    BadImage
        The file is of another size or format, damaged, animated, transparent without a background,
        or has more than 8 bits in a channel.
    """
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened, formats=tuple(FORMATS)) as image:
            depth = _check(source, image)
            found = upright_size(image)
            if size is not None and found != size:
                raise BadImage(f"is {found[0]}x{found[1]} pixels")
            image.load()  # a cut-off file opens well and fails only here
            flat = _flat(image, depth, background)
            return _upright(flat, _orientation(image))
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        names = ", ".join(FORMATS)
        raise BadImage(f"cannot be read: it is damaged, or it is none of {names}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"cannot be read: it has too many pixels ({error})") from error
    except Exception as error:  # PIL: OSError, SyntaxError, ValueError, struct.error and others
        raise BadImage(f"cannot be read ({type(error).__name__}: {error})") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened image as it is seen, before the image is decoded."""
    width, height = image.size
    # of a TIFF, Pillow gives the upright size from the start
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _check(source: Path | bytes, image: Image.Image) -> int:
    """Return the bits per channel; refuse an image that would be read otherwise than it is seen."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadImage(f"has {frames} frames or pages; save the one that is meant alone")
    depth = _depth(source, image)
    if depth > 8:
        raise BadImage(
            f"has more than 8 bits per channel ({depth}, mode {image.mode}); convert it to 8"
        )
    if image.mode not in _MODES:
        raise BadImage(f"is in the colour mode {image.mode}; convert it to RGB")
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        raise BadImage("is CMYK and does not say whether it is inverted; convert it to RGB")
    return depth


def _depth(source: Path | bytes, image: Image.Image) -> int:
    """Return the bits per channel in the file: Pillow silently reads several 16-bit kinds as 8
    bits.
    """
    if image.format == "PNG":
        head = source[:25] if isinstance(source, bytes) else _head(source)
        if head[12:16] != b"IHDR":
            raise BadImage("cannot be read: its first chunk is not IHDR, so it is not a usual PNG")
        return head[24]
    tags = getattr(image, "tag_v2", None)  # TIFF; an MPO is 8 bits like any JPEG
    if tags is not None and image.format == "TIFF":
        if any(form != _UNSIGNED for form in tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))):
            raise BadImage("holds signed or floating-point values; convert it to 8 unsigned bits")
        return max(tags.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if image.mode.startswith(("I", "F")) else 8


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(25)


def _flat(image: Image.Image, depth: int, background: Background | None) -> Image.Image:
    """Return the decoded image without transparency, as L or RGB."""
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    if image.format == "PNG" and image.mode == "L" and depth < 8:
        # Pillow spreads the pixels over 0..255 and leaves the transparent level as it was
        image.info["transparency"] *= 255 // (2**depth - 1)
    if image.mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(image.convert("RGBA"))
    colour, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if alpha.min() < 255:
        if background is None:
            raise BadImage(
                "has transparent pixels and data.background is not set; set it to white or black"
            )
        over = LEVELS[background] * (255 - alpha)
        colour = ((colour * alpha + over + 127) // 255).astype(np.uint8)  # rounded to nearest
    return Image.fromarray(np.ascontiguousarray(colour))


def _orientation(image: Image.Image) -> object:
    """Return 1 to 8 in files that are sound; after decoding, a TIFF has no orientation left."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1  # damaged EXIF data say nothing: people see such an image as it is stored


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """Return the turned image; of the EXIF data only the orientation is kept, which Pillow can
    write.
    """
    if orientation == 1:
        return image
    bare = Image.fromarray(np.asarray(image))
    bare.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(bare)
