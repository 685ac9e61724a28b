"""What travels between server and worker, byte for byte.

Only kept values travel, tensor by tensor, as raw little-endian bytes. A mask that both ends can
derive costs nothing; one that depends on theta's values goes to the client as packed bits (single
weights) or as a list of groups (channels). Towards the client values are kept, then cast; towards
the server kept, turned into differences where the configuration says so, and cast.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox
from fed_diffusion.config import Config
from fed_diffusion.masks.recipe import Masks, Numbers, Recipe, kept_count
from fed_diffusion.masks.spaces import Block, Layout
from fed_diffusion.protocol.codecs import (
    DTYPES,
    Cast,
    Packed,
    cast,
    expand,
    kept_of,
    select,
    unpack,
)
from fed_diffusion.protocol.errors import UpdateError

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the wire format is little-endian and this machine is not")

MASK_PREFIX = "mask:"
BESIDE = 1 << 20
"""Bytes of an update that are not theta's values, at most."""
VERSION = 1
"""Raised when a payload would be read otherwise, or when the same settings make another one: runs
that were begun before would not end with the bits they would have ended with."""


@dataclass(frozen=True)
class Payload:
    """Everything that one message carries: tensors and numbers."""

    arrays: dict[str, Packed]
    numbers: Numbers = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The ledger's count: array bytes, and for each number eight bytes and its key."""
        arrays = sum(len(packed.data) for packed in self.arrays.values())
        numbers = sum(
            8 * (len(value) if isinstance(value, list) else 1) + len(key.encode())
            for key, value in self.numbers.items()
        )
        return arrays + numbers


# --- towards the client -------------------------------------------------------------------------


def cast_theta(theta: Mapping[str, Tensor], config: Config, round: int) -> dict[str, Cast]:
    """theta_r as it travels, once a round for all clients: each is sent its part of the same bytes.

    With single weights masked anywhere, int8 has one scale per tensor; see `per_row`.
    """
    stream = philox(config.seed, Purpose.ROUNDING_DOWN, round)
    rows = per_row(config)
    return {name: cast(value, config.wire.down, rows, stream) for name, value in theta.items()}


def per_row(config: Config) -> bool:
    """Whether int8 has a scale per output channel: not where masks leave no rows to scale."""
    pruning = config.pruning
    scattered = pruning.kind != "full" and not pruning.by_channels
    return config.wire.scale == "channel" and not scattered


def encode_task(casts: Mapping[str, Cast], recipe: Recipe, masks: Masks) -> Payload:
    """What a client needs of theta_r: kept values, the recipe and, where needed, mask bits."""
    arrays = {name: part.take(masks.get(name)).pack() for name, part in casts.items()}
    if recipe.needs_bits:
        arrays |= encode_bits(masks)
    return Payload(arrays, recipe.to_metrics())


def decode_task(
    payload: Payload, theta: Mapping[str, Tensor], layout: Layout | None, config: Config
) -> tuple[Recipe, Masks, dict[str, Tensor]]:
    """The recipe, the mask and theta_{r,n,0} = theta_r * m; `theta` gives names and shapes.

    Where whole channels are dropped the tensors come out small, else zero where the mask drops.
    """
    recipe = Recipe.from_metrics(payload.numbers)
    bits = {k: v for k, v in payload.arrays.items() if k.startswith(MASK_PREFIX)}
    values = {k: v for k, v in payload.arrays.items() if not k.startswith(MASK_PREFIX)}
    masks = recipe.mask(theta, layout) if not recipe.needs_bits else decode_bits(bits, theta)
    if recipe.needs_bits:
        recipe.check_bits(masks, theta)
    kept = _decode(values, theta, masks, config.wire.down, per_row(config))
    for name, mask in masks.items():
        if isinstance(mask, Tensor):
            kept[name] = expand(kept[name], mask)
    return recipe, masks, kept


# --- towards the server -------------------------------------------------------------------------


def encode_update(
    end: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    masks: Masks,
    config: Config,
    round: int,
    client: int,
) -> dict[str, Packed]:
    """What training made of the kept values: theta_{r,n,S}, or its difference to theta_{r,n,0}.

    Parameters
    ----------
    end, start
        The worker's parameters, small where whole channels are dropped.
    """
    stream = philox(config.seed, Purpose.ROUNDING, round, client)
    packed = {}
    for name, value in end.items():
        mask = masks.get(name)
        kept = value.detach().to("cpu", torch.float32)
        if config.wire.differences:
            kept = kept - start[name]
        if isinstance(mask, Tensor):
            kept = select(kept, mask)
        packed[name] = cast(kept, config.wire.up, per_row(config), stream).pack()
    return packed


def decode_update(
    arrays: Mapping[str, Packed], theta: Mapping[str, Tensor], masks: Masks, config: Config
) -> dict[str, Tensor]:
    """One worker's part of the mean (8): its values, or theta_r plus its differences.

    The difference is to what the worker decoded; added to theta_r itself, what rounding changed on
    the way down does not stay in the model. Only kept values: one-dimensional under bool masks.

    Raises
    ------
    UpdateError
        A name, dtype, shape or length that the recipe does not imply.
    """
    base = theta if config.wire.differences else None
    return _decode(arrays, theta, masks, config.wire.up, per_row(config), base)


def largest_update(theta: Mapping[str, Tensor], kept: float, config: Config) -> int:
    """The most bytes that an update can have whose mask keeps this part of all coordinates.

    Beside the values there are int8's scales, what alignment adds, and what is not theta's:
    numbers, and in diagnostic rounds a few gradients' projections.
    """
    values = math.ceil(kept * sum(value.numel() for value in theta.values()))
    rows = sum(len(value) if value.dim() > 1 else 1 for value in theta.values())
    return DTYPES[config.wire.up].itemsize * values + 4 * rows + 8 * len(theta) + BESIDE


def _decode(
    arrays: Mapping[str, Packed],
    theta: Mapping[str, Tensor],
    masks: Masks,
    dtype: str,
    rows: bool,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Kept values by name, with `base` added to them."""
    if arrays.keys() != theta.keys():
        odd = sorted(arrays.keys() ^ theta.keys())[:3]
        raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
    decoded = {}
    for name, whole in theta.items():
        mask = masks.get(name)
        if mask is None:
            expected = tuple(whole.shape)
        else:
            expected = mask.kept if isinstance(mask, Block) else (kept_count(mask),)
        values = unpack(name, arrays[name], dtype, expected, rows)
        if base is not None:
            values = values + kept_of(base[name], mask)
        decoded[name] = values
    return decoded


# --- masks that only their bits describe --------------------------------------------------------


def encode_bits(masks: Masks) -> dict[str, Packed]:
    """Mask bits, eight to a byte, for a client that cannot derive them."""
    packed = {}
    for name, mask in masks.items():
        assert isinstance(mask, Tensor)
        bits = np.packbits(mask.flatten().numpy(), bitorder="little")
        packed[MASK_PREFIX + name] = Packed("bits", tuple(mask.shape), bits.tobytes())
    return packed


def decode_bits(arrays: Mapping[str, Packed], theta: Mapping[str, Tensor]) -> Masks:
    """The inverse of `encode_bits`; raises `UpdateError` on a wrong name or length."""
    masks: Masks = {}
    for key, packed in arrays.items():
        name = key.removeprefix(MASK_PREFIX)
        fits = name in theta and packed.shape == tuple(theta[name].shape)
        if not fits or packed.dtype != "bits":
            raise UpdateError(f"mask bits for {name} do not fit the model")
        count = math.prod(packed.shape)
        if len(packed.data) != (count + 7) // 8:
            raise UpdateError(f"mask bits for {name} have {len(packed.data)} bytes")
        bits = np.frombuffer(packed.data, np.uint8)
        kept = np.unpackbits(bits, count=count, bitorder="little").view(bool)
        masks[name] = torch.from_numpy(kept).view(packed.shape)
    return masks
