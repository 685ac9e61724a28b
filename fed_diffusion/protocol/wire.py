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
from fed_diffusion.config.schema import LocalConfig, PruningConfig, WireConfig
from fed_diffusion.masks.families import Family, derive
from fed_diffusion.masks.mask import Mask, Masks, Scattered, mask_of
from fed_diffusion.masks.recipe import Numbers, Recipe, RecipeError
from fed_diffusion.masks.spaces import Layout
from fed_diffusion.protocol.codecs import DTYPES, Cast, Packed, cast, unpack
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.moments import PREFIXES, Counts, Outgoing, is_shared, parameter_of

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the wire format is little-endian and this machine is not")

MASK_PREFIX = "mask:"
BESIDE = 1 << 20
"""The bytes of an update that are not theta's values, at most."""
VERSION = 2
"""The version of the wire format.

It is raised when a payload would be read otherwise, or when the same settings make another one:
runs that were begun before would not end with the bits they would have ended with.
"""


@dataclass(frozen=True)
class Wire:
    """How the tensors of a run travel, which both halves know before any round.

    Attributes
    ----------
    settings, pruning, local
        These sections of the configuration.
    family
        The run's mask family.
    seed
        The seed of the run, for what is rounded at random.
    """

    settings: WireConfig
    pruning: PruningConfig
    local: LocalConfig
    family: Family
    seed: int

    @property
    def rows(self) -> bool:
        """Whether int8 has a scale per output channel: not where masks leave no rows to scale."""
        if self.settings.scale != "channel":
            return False
        return self.pruning.kind == "full" or self.family.shrinks


@dataclass(frozen=True)
class Payload:
    """Everything that one message carries: tensors and numbers."""

    arrays: dict[str, Packed]
    numbers: Numbers = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the ledger's count: array bytes, and for each number eight bytes and its key.

        A name counts as the bytes of its letters in the number's place.
        """
        arrays = sum(len(packed.data) for packed in self.arrays.values())
        return arrays + sum(len(k.encode()) + _size(value) for k, value in self.numbers.items())


def _size(value: int | float | str | list[int]) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return 8 * (len(value) if isinstance(value, list) else 1)


# --- towards the client -------------------------------------------------------------------------


def cast_theta(theta: Mapping[str, Tensor], wire: Wire, round: int) -> dict[str, Cast]:
    """theta_r as it travels, once a round for all clients: each is sent its part of the same bytes.

    With single weights masked anywhere, int8 has one scale per tensor; see `Wire.rows`.
    """
    stream = philox(wire.seed, Purpose.ROUNDING_DOWN, round)
    rows, down = wire.rows, wire.settings.down
    return {name: cast(value, down, rows, stream) for name, value in theta.items()}


def encode_task(
    casts: Mapping[str, Cast | Outgoing | Counts], recipe: Recipe, masks: Masks
) -> Payload:
    """Return what a client needs of theta_r and of the optimiser's state, where that is shared.

    These are the kept values, the recipe and, where needed, mask bits.
    """
    arrays = {
        name: part.take(mask_of(masks, parameter_of(name), part.codes)).pack()
        for name, part in casts.items()
    }
    if recipe.needs_bits:
        arrays |= encode_bits(masks)
    return Payload(arrays, recipe.to_metrics())


def decode_task(
    payload: Payload, theta: Mapping[str, Tensor], layout: Layout | None, wire: Wire
) -> tuple[Recipe, Masks, dict[str, Tensor]]:
    """Return the recipe, the mask and theta_{r,n,0} = theta_r * m.

    `theta` gives names and shapes. Where whole channels are dropped the tensors come out small,
    else they are zero where the mask drops.
    """
    recipe = Recipe.from_metrics(payload.numbers)
    bits = {k: v for k, v in payload.arrays.items() if k.startswith(MASK_PREFIX)}
    odd = (MASK_PREFIX, *PREFIXES) if is_shared(wire.local) else MASK_PREFIX
    values = {k: v for k, v in payload.arrays.items() if not k.startswith(odd)}
    masks = told_masks(recipe, bits, theta, layout, wire)
    kept = _decode(values, theta, masks, wire.settings.down, wire.rows)
    held = {name: mask.hold(kept[name]) for name, mask in masks.items()}
    return recipe, masks, kept | held


def told_masks(
    recipe: Recipe,
    bits: Mapping[str, Packed],
    theta: Mapping[str, Tensor],
    layout: Layout | None,
    wire: Wire,
) -> Masks:
    """A client's masks: of the configured family, whatever a message names."""
    family, kind = wire.family, wire.pruning.kind
    if not recipe.whole() and recipe.kind != kind:
        raise RecipeError(f"recipe: kind = {recipe.kind!r}, and the run's is {kind!r}")
    if recipe.needs_bits != (family.sends_bits and not recipe.whole()):
        raise RecipeError(f"recipe: needs_bits = {recipe.needs_bits} is not {kind}'s")
    if not recipe.needs_bits:
        return derive(family, recipe, theta, layout)
    masks = decode_bits(bits, theta)
    family.check_bits(recipe, masks, theta)
    return masks


# --- towards the server -------------------------------------------------------------------------


def encode_update(
    end: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    masks: Masks,
    wire: Wire,
    round: int,
    client: int,
) -> dict[str, Packed]:
    """Return what training made of the kept values: theta_{r,n,S}, or its difference to
    theta_{r,n,0}.

    Parameters
    ----------
    end, start
        The worker's parameters, small where whole channels are dropped.
    """
    stream = philox(wire.seed, Purpose.ROUNDING, round, client)
    packed = {}
    for name, value in end.items():
        held = value.detach().to("cpu", torch.float32)
        if wire.settings.differences:
            held = held - start[name]
        kept = mask_of(masks, name, held).release(held)
        packed[name] = cast(kept, wire.settings.up, wire.rows, stream).pack()
    return packed


def decode_update(
    arrays: Mapping[str, Packed], theta: Mapping[str, Tensor], masks: Masks, wire: Wire
) -> dict[str, Tensor]:
    """Return a worker's part of the mean (8): its values, or theta_r plus its differences.

    The difference is to what the worker decoded; added to theta_r itself, what rounding changed on
    the way down does not stay in the model. Only kept values: one-dimensional under bool masks.

    Raises
    ------
    UpdateError
        A name, dtype, shape or length is not what the recipe implies.
    """
    base = theta if wire.settings.differences else None
    return _decode(arrays, theta, masks, wire.settings.up, wire.rows, base)


def largest_update(theta: Mapping[str, Tensor], kept: float, wire: Wire) -> int:
    """The most bytes that an update can have whose mask keeps this part of all coordinates.

    Beside the values there are the two moments of a shared state, int8's scales, what alignment
    adds, and what is not theta's: numbers, and in diagnostic rounds a few gradients' projections.
    """
    values = math.ceil(kept * sum(value.numel() for value in theta.values()))
    rows = sum(len(value) if value.dim() > 1 else 1 for value in theta.values())
    moments = 2 * 4 if is_shared(wire.local) else 0
    each = DTYPES[wire.settings.up].itemsize + moments
    return each * values + 4 * rows + 8 * len(theta) + BESIDE


def _decode(
    arrays: Mapping[str, Packed],
    theta: Mapping[str, Tensor],
    masks: Masks,
    dtype: str,
    rows: bool,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return kept values by name, with `base` added to them."""
    if arrays.keys() != theta.keys():
        odd = sorted(arrays.keys() ^ theta.keys())[:3]
        raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
    decoded = {}
    for name, whole in theta.items():
        mask = mask_of(masks, name, whole)
        values = unpack(name, arrays[name], dtype, mask.kept, rows)
        if base is not None:
            values = values + mask.take(base[name])
        decoded[name] = values
    return decoded


# --- masks that only their bits describe --------------------------------------------------------


def encode_bits(masks: Masks) -> dict[str, Packed]:
    """Return mask bits, eight to a byte, for a client that cannot derive them."""
    packed = {}
    for name, mask in masks.items():
        bits = np.packbits(mask.dense().flatten().numpy(), bitorder="little")
        packed[MASK_PREFIX + name] = Packed("bits", tuple(mask.shape), bits.tobytes())
    return packed


def decode_bits(arrays: Mapping[str, Packed], theta: Mapping[str, Tensor]) -> Masks:
    """Undo `encode_bits`; raise `UpdateError` on a wrong name or length."""
    masks: dict[str, Mask] = {}
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
        masks[name] = Scattered(torch.from_numpy(kept).view(packed.shape))
    return masks
