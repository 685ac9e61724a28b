"""Random changes of training images: transforms of torchvision by name (data.augment)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.common.plugins import blamed
from fed_diffusion.common.rng import Purpose, seed_torch
from fed_diffusion.config.schema import ConfigError, DataConfig

Transform = Callable[[Tensor], Tensor]
TRIALS = 8
"""How often a transform is tried before a run: its random draws may decide what it returns."""


class Augment:
    """Transforms that are applied to each image separately, with random draws from `draw` alone.

    torchvision's transforms take their randomness from torch's own CPU generator, whatever the
    device. For each batch the generator starts from a state drawn from `draw`, and its own state is
    put back afterwards. The images are changed on the CPU, so that those of a GPU are the same.
    """

    def __init__(self, transforms: list[Transform]):
        self._transforms = transforms

    def __call__(self, images: Tensor, draw: np.random.Generator) -> Tensor:
        """Return changed copies of images uint8 [n, C, H, W]."""
        with torch.random.fork_rng(devices=[]):
            seed_torch(int(draw.integers(2**63)), Purpose.AUGMENTATION, cuda=False)
            changed = [self._one(image) for image in images.cpu()]
        return torch.stack(changed).to(images.device)

    def _one(self, image: Tensor) -> Tensor:
        for transform in self._transforms:
            image = transform(image)
        return image


def augmentation(config: DataConfig, shape: tuple[int, int, int] | None = None) -> Augment | None:
    """Return what data.augment says; None where it is empty.

    Parameters
    ----------
    shape
        [C, H, W] of the images: each transform is tried on one, to refuse what does not keep it.

    Raises
    ------
    ConfigError
        There is no such transform, it does not take these options, or its result is not an
        image of the same shape.
    """
    if not config.augment:
        return None
    transforms: list[Transform] = []
    for i, entry in enumerate(config.augment):
        ((name, options),) = entry.items()
        transforms.append(_made(i, name, options))
        if shape is not None:
            _try(i, name, transforms[-1], shape)
    return Augment(transforms)


def _made(i: int, name: str, options: dict[str, Any]) -> Transform:
    from torchvision.transforms import v2  # a second to import

    key, known = f"data.augment[{i}]", transforms_by_name()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{key} = {name!r} is not a transform of torchvision.transforms.v2.{hint} There are: "
            f"{', '.join(known)}."
        )
    with blamed(key, name):
        made: Transform = getattr(v2, name)(**options)
    return made


def transforms_by_name() -> list[str]:
    """Return the transforms that take one tensor and no other transforms."""
    from torchvision.transforms import v2

    return sorted(
        name
        for name, kind in vars(v2).items()
        if isinstance(kind, type)
        and issubclass(kind, v2.Transform)
        and kind is not v2.Transform
        and name not in ("Compose", "RandomApply", "RandomChoice", "RandomOrder", "Lambda")
    )


def _try(i: int, name: str, transform: Transform, shape: tuple[int, int, int]) -> None:
    image = torch.arange(math.prod(shape)).reshape(shape).to(torch.uint8)
    for seed in range(TRIALS):
        with blamed(f"data.augment[{i}]", name), torch.random.fork_rng(devices=[]):
            seed_torch(seed, Purpose.AUGMENTATION, cuda=False)
            found: Any = transform(image)
        if isinstance(found, Tensor) and (found.dtype, found.shape) == (torch.uint8, image.shape):
            continue
        what = type(found).__name__
        if isinstance(found, Tensor):
            what = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        raise ConfigError(
            f"data.augment[{i}] = {name!r} makes {what} of an image uint8 {list(image.shape)}; "
            "training needs images of the same shape and type. Change its options, or use "
            "data.crop, data.resize or data.pad, which apply to all images alike."
        )
