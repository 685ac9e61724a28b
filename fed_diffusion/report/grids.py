"""Images side by side in one PNG, small ones enlarged so that a person sees them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 2
BACKGROUND = 128  # neither digits' black nor the white of a page
SHOWN_SIDE = 48  # 8x8 digits at 6x; from about 72 pixels on images stay as they are


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Lay out images row by row, with gaps of 2 pixels between and around them.

    Parameters
    ----------
    images
        uint8 [n, 1 or 3, H, W], n >= 1.
    columns
        Images per row; default: as square as it gets.
    scale
        Pixels per image pixel and direction, repeated, not smoothed; default: about 48 per side.

    Returns
    -------
    uint8 [height, width] for grey images, [height, width, 3] for colour.

    Raises
    ------
    TypeError, ValueError
        The images have another type or shape, or there are none.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"a grid takes uint8 images, not {getattr(images, 'dtype', type(images))}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"a grid takes images [n, 1 or 3, H, W], not {list(images.shape)}")
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = max(1, round(SHOWN_SIDE / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns = {columns} and scale = {scale} must be at least 1")
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    page = np.full((rows * step_y + GAP, columns * step_x + GAP, channels), BACKGROUND, np.uint8)
    pixels = images.cpu().permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    for i in range(n):
        top, left = GAP + i // columns * step_y, GAP + i % columns * step_x
        page[top : top + height * scale, left : left + width * scale] = pixels[i]
    return page[:, :, 0] if channels == 1 else page


def save_grid(
    images: Tensor, path: Path | str, columns: int | None = None, scale: int | None = None
) -> Path:
    """Write `grid` as a PNG, whole or not at all; the folder is made if need be."""
    path = Path(path)
    page = Image.fromarray(grid(images, columns, scale))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        page.save(unfinished, format="PNG", optimize=True)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
