"""Images of any size become the square that networks take: data.crop, data.resize, data.pad."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data.decode import LEVELS, BadImage

HOW = (
    "data.crop=square keeps the middle of images that are not square, data.pad=N puts them into a "
    "border of N x N pixels, and data.resize=N scales them to N pixels"
)
"""The settings that help where images are not of one square size."""


def fit(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return images uint8 [..., H, W], cropped, scaled and padded, in this order.

    Raises
    ------
    BadImage
        The images are smaller than data.crop or larger than data.pad; the message goes on after
        the images' name.
    """
    pixels = _cropped(pixels, config)
    if config.resize is not None:
        pixels = _scaled(pixels, config.resize)
    return pixels if config.pad is None else _padded(pixels, config)


def _cropped(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    height, width = pixels.shape[-2:]
    if config.crop is None:
        return pixels
    side = min(height, width) if config.crop == "square" else config.crop
    if side > min(height, width):
        raise BadImage(f"is {width}x{height} pixels, fewer than data.crop = {side}")
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[..., top : top + side, left : left + side]


def _scaled(pixels: np.ndarray, longest: int) -> np.ndarray:
    height, width = pixels.shape[-2:]
    factor = longest / max(height, width)
    if factor == 1:
        return pixels
    size = [max(1, round(side * factor)) for side in (width, height)]
    planes = np.ascontiguousarray(pixels).reshape(-1, height, width)
    scaled = np.empty((len(planes), size[1], size[0]), np.uint8)
    for i, plane in enumerate(planes):  # Pillow scales the channels of an image one by one, too
        scaled[i] = Image.fromarray(plane).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return scaled.reshape(*pixels.shape[:-2], size[1], size[0])


def _padded(pixels: np.ndarray, config: DataConfig) -> np.ndarray:
    height, width = pixels.shape[-2:]
    side = config.pad or 0
    if max(height, width) > side:
        raise BadImage(f"is {width}x{height} pixels, more than data.pad = {side}")
    top, left = (side - height) // 2, (side - width) // 2
    level = LEVELS[config.background or "black"]
    framed = np.full((*pixels.shape[:-2], side, side), level, dtype=np.uint8)
    framed[..., top : top + height, left : left + width] = pixels
    return framed
