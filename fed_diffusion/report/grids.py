"""Images side by side in one PNG; small ones are enlarged so that a person can see them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

GAP = 2
BACKGROUND = 128  # neither digits' black nor the white of a page
LAYOUT = "fed-diffusion"  # the key of a PNG's text
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
    scale = default_scale(height, width) if scale is None else scale
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
    images: Tensor,
    path: Path | str,
    columns: int | None = None,
    scale: int | None = None,
    labels: Sequence[int] | None = None,
) -> Path:
    """Write `grid` as a PNG, whole or not at all; make the folder if need be.

    Parameters
    ----------
    labels
        The class of each image, where it has one: kept in the file with the layout, for `tiles`.
    """
    path = Path(path)
    picture = Image.fromarray(grid(images, columns, scale))
    layout = PngInfo()
    if labels is not None:
        size = list(images.shape[2:])
        known = {"size": size, "scale": scale or default_scale(*size), "labels": list(labels)}
        layout.add_text(LAYOUT, json.dumps(known))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.save(unfinished, format="PNG", optimize=True, pnginfo=layout)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def tiles(path: Path) -> tuple[Tensor, list[int]] | None:
    """Return the images and labels of a grid that `save_grid` wrote with labels; else None.

    Returns
    -------
    uint8 [n, 1 or 3, H, W], n labels
    """
    try:
        with Image.open(path) as file:
            layout = json.loads(file.info[LAYOUT])
            page = np.asarray(file)
        (height, width), scale, labels = (layout[key] for key in ("size", "scale", "labels"))
        step_y, step_x = height * scale + GAP, width * scale + GAP
        columns = (page.shape[1] - GAP) // step_x
        starts = [divmod(i, columns) for i in range(len(labels))]
        cut = [
            page[GAP + row * step_y :: scale, GAP + column * step_x :: scale][:height, :width]
            for row, column in starts
        ]
        images = torch.from_numpy(np.stack(cut))
    except (OSError, KeyError, ValueError, TypeError, ZeroDivisionError, SyntaxError):
        return None  # a grid without labels, of another layout, or a file that is no whole PNG
    return (images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)), labels


def default_scale(height: int, width: int) -> int:
    return max(1, round(SHOWN_SIDE / max(height, width)))
