"""A data set of the user's own: 600 drawn rings and discs, made from a seed.

    fed-diffusion run digits --set data.name=examples.own_dataset:shapes \
        --set data.size=8 --set data.channels=1 --set data.classes=2

The contract is `fed_diffusion.Loader`: images uint8 [n, C, H, W] with values 0 to 255, labels from
0. Every process of a run calls the function, and must get the same images in the same order.
"""

from __future__ import annotations

import torch

from fed_diffusion import ImageSet
from fed_diffusion.config.schema import DataConfig

COUNT = 600


def shapes(config: DataConfig) -> ImageSet:
    """Return rings (label 0) and discs (label 1) of random centres and radii on black."""
    side, channels = config.size or 8, config.channels or 1
    draw = torch.Generator().manual_seed(0)
    centre = side / 2 + torch.rand(COUNT, 2, 1, 1, generator=draw) * side / 4 - side / 8
    radius = side / 4 + torch.rand(COUNT, 1, 1, generator=draw) * side / 8
    labels = torch.arange(COUNT) % 2
    at = torch.arange(side) + 0.5
    away = ((at[:, None] - centre[:, 0]) ** 2 + (at[None, :] - centre[:, 1]) ** 2).sqrt()
    disc = (radius + 0.5 - away).clamp(0, 1)  # a soft edge of one pixel
    hole = (radius / 2 + 0.5 - away).clamp(0, 1) * (labels == 0)[:, None, None]
    images = (255 * (disc - hole)).round().to(torch.uint8)
    return ImageSet(
        images[:, None].expand(-1, channels, -1, -1).contiguous(),
        labels,
        name="shapes",
        class_names=("ring", "disc"),
    )
