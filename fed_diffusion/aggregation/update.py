"""Every update is checked for names, shapes and room before it is averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from fed_diffusion.masks.mask import Mask, Masks, mask_of
from fed_diffusion.protocol.errors import DivergedError, LimitError, RangeError, UpdateError

FRACTION_BITS = 40
LIMIT = 2.0 ** (63 - FRACTION_BITS)
"""The bound on a coordinate's weighted sum of magnitudes, so that int64 cannot overflow."""
VALUES = 64.0
"""The magnitude of values for which there is room at any weight; networks stay far below."""


class Room:
    """The number of updates that there is room for, and how large the values of each may be.

    Each update has an equal share of the sums' range, so that whether one is accepted does not
    depend on what came before it.

    Parameters
    ----------
    workers
        The most updates that will be added.
    heaviest
        The largest weight of an update. At all weights up to it there is room for values up to 64.

    Attributes
    ----------
    scale
        A power of two, by which values are multiplied so that the heaviest fit.
    share
        What a value times its weight and `scale` must stay below.
    """

    def __init__(self, workers: int, heaviest: int = 1):
        self.share = LIMIT / workers
        self.scale = 2.0 ** -max(0, math.ceil(math.log2(workers * heaviest * VALUES / LIMIT)))
        self._left = workers

    def check(self, weight: float) -> int:
        """Return the weight of an update as a whole number.

        Raises
        ------
        UpdateError
            The weight is not a positive whole number, or there is no room for such an update.
        """
        whole = int(weight)
        if whole != weight or whole < 1:
            raise UpdateError(f"weight = {weight}; it must be a positive whole number")
        if self._left < 1:
            raise LimitError("no room for this update: all that were announced have been added")
        if whole * self.scale >= self.share:
            raise LimitError(f"no room for an update of weight {whole}; see `heaviest`")
        return whole

    def take(self) -> None:
        """Note that an update has been added."""
        self._left -= 1

    def refuse(self, name: str, largest: float, weight: int) -> NoReturn:
        """Raise an error about values of this magnitude, which are not within the share."""
        if not largest < float("inf"):
            raise DivergedError(f"{name} holds values that are not finite")
        room = self.share / (weight * self.scale)
        kind = RangeError if largest < LIMIT else DivergedError
        raise kind(
            f"{name} holds values as large as {largest:.3g}: beyond {room:g}, the share of one "
            f"update of weight {weight} in the sums' range"
        )


def check_update(
    theta: Mapping[str, Tensor], values: Mapping[str, Tensor], masks: Masks
) -> dict[str, Mask]:
    """Refuse an update that is not of this model; its values are not looked at.

    Parameters
    ----------
    values
        Floating tensors by theta's names, shaped like what the masks keep; under masks of single
        weights they may be shaped like theta, too.

    Returns
    -------
    dict
        The mask of every tensor, by theta's names.

    Raises
    ------
    UpdateError
        The names, shapes or types are wrong.
    """
    if values.keys() != theta.keys():
        odd = sorted(values.keys() ^ theta.keys())[:3]
        raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
    if unknown := sorted(masks.keys() - theta.keys())[:3]:
        raise UpdateError(f"masks for tensors the model lacks, first of them: {unknown}")
    found = {name: mask_of(masks, name, whole) for name, whole in theta.items()}
    for name, value in values.items():
        _check_shape(name, value, found[name], tuple(theta[name].shape))
    return found


def _check_shape(name: str, value: Tensor, mask: Mask, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise UpdateError(f"the mask of {name} is not of shape {shape}")
    # of values shaped like theta under a mask of single weights, those that it drops are not read
    whole = mask.bools is not None and tuple(value.shape) == shape
    expected = shape if whole else mask.kept
    if tuple(value.shape) != expected or not value.is_floating_point():
        raise UpdateError(f"{name} is {value.dtype} {tuple(value.shape)}, not floating {expected}")


def kept_part(value: Tensor, mask: Mask) -> Tensor:
    """Return the kept values of a tensor that `check_update` has let through."""
    return value if tuple(value.shape) == mask.kept else mask.take(value)
