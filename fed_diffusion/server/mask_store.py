"""The masks of an open round on the server: derived when they are needed, or kept packed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.masks.families import Family, derive
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.masks.spaces import Layout
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.wire import decode_bits, encode_bits

MASK_BYTES = 64 << 20
"""The bytes of packed masks that a round keeps until their updates come, at most."""

Bits = dict[str, Packed]


class MaskStore:
    """The masks of one round on the server; everything that the server does with masks is here.

    Parameters
    ----------
    theta
        theta_r, which some masks are derived from.
    family
        The run's mask family.
    layout
        The network's channel spaces, where whole channels are dropped.
    outlived
        Whether updates may come when theta has changed: a mask that depends on theta's values must
        then be kept, and one that does not is never kept.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        family: Family,
        layout: Layout | None,
        outlived: bool = False,
    ):
        self._theta = theta
        self._family = family
        self._layout = layout
        self._outlived = outlived
        self._room = MASK_BYTES
        self._shared: dict[float, Masks] = {}
        """Keep ratio -> mask, where the mask is the same for all clients of a round."""

    def derive(self, recipe: Recipe) -> Masks:
        """Return the mask that a recipe describes at this theta."""
        if recipe.whole() or not self._family.shared:
            return derive(self._family, recipe, self._theta, self._layout)
        if recipe.keep not in self._shared:
            self._shared[recipe.keep] = derive(self._family, recipe, self._theta, self._layout)
        return self._shared[recipe.keep]

    def pack(self, recipe: Recipe, masks: Masks) -> Bits | None:
        """Return what to keep of a mask until its update comes; None where it is derived again.

        Deriving a random or balanced mask of weights costs ten times as much as unpacking it.
        """
        if self._outlived:
            return encode_bits(masks) if recipe.needs_bits else None
        size = sum((math.prod(mask.shape) + 7) // 8 for mask in masks.values())
        if self._family.shrinks or self._family.shared or size > self._room:
            return None
        self._room -= size
        return encode_bits(masks)

    def of(self, recipe: Recipe, bits: Bits | None) -> Masks:
        """Return the mask that a client trained under, from what `pack` has kept."""
        return self.derive(recipe) if bits is None else decode_bits(bits, self._theta)
