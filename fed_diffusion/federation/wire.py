"""What travels between server and worker, byte for byte.

Only kept values travel, tensor by tensor, as raw little-endian bytes. A mask that both ends can
derive costs nothing; one that depends on theta's values goes to the client as packed bits.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.federation.aggregate import UpdateError
from fed_diffusion.masks.recipes import Masks, Recipe

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("the wire format is little-endian and this machine is not")

Numbers = dict[str, int | float]


@dataclass(frozen=True)
class Packed:
    """One tensor on the wire: float32 values, or mask bits packed eight to a byte."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Payload:
    """Everything that one message carries: tensors and numbers."""

    arrays: dict[str, Packed]
    numbers: Numbers = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The ledger's count: array bytes, and eight bytes and its key for each number."""
        arrays = sum(len(packed.data) for packed in self.arrays.values())
        return arrays + sum(8 + len(key.encode()) for key in self.numbers)


MASK_PREFIX = "mask:"


def encode_values(values: Mapping[str, Tensor], masks: Masks) -> dict[str, Packed]:
    """The kept values of each tensor, in order, as float32 bytes."""
    packed = {}
    for name, value in values.items():
        mask = masks.get(name)
        kept = value.detach() if mask is None else value.detach()[mask]
        array = kept.to("cpu", torch.float32).contiguous().numpy()
        packed[name] = Packed("float32", tuple(array.shape), array.tobytes())
    return packed


def decode_values(
    arrays: Mapping[str, Packed], shapes: Mapping[str, torch.Size], masks: Masks
) -> dict[str, Tensor]:
    """Dense tensors from kept values: zero where the mask drops.

    Raises
    ------
    UpdateError
        A name, dtype, shape or length that the recipe does not imply.
    """
    if arrays.keys() != shapes.keys():
        odd = sorted(arrays.keys() ^ shapes.keys())[:3]
        raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
    dense = {}
    for name, shape in shapes.items():
        mask = masks.get(name)
        expected = tuple(shape) if mask is None else (int(mask.sum()),)
        values = _floats(name, arrays[name], expected)
        dense[name] = values if mask is None else _expand(values, mask)
    return dense


def encode_bits(masks: Masks) -> dict[str, Packed]:
    """Mask bits, eight to a byte, for a client that cannot derive them."""
    packed = {}
    for name, mask in masks.items():
        bits = np.packbits(mask.flatten().numpy(), bitorder="little")
        packed[MASK_PREFIX + name] = Packed("bits", tuple(mask.shape), bits.tobytes())
    return packed


def decode_bits(arrays: Mapping[str, Packed], shapes: Mapping[str, torch.Size]) -> Masks:
    """The inverse of `encode_bits`; raises `UpdateError` on a wrong name or length."""
    masks: Masks = {}
    for key, packed in arrays.items():
        name = key.removeprefix(MASK_PREFIX)
        if name not in shapes or packed.shape != tuple(shapes[name]) or packed.dtype != "bits":
            raise UpdateError(f"mask bits for {name} do not fit the model")
        count = math.prod(packed.shape)
        if len(packed.data) != (count + 7) // 8:
            raise UpdateError(f"mask bits for {name} have {len(packed.data)} bytes")
        bits = np.frombuffer(packed.data, np.uint8)
        kept = np.unpackbits(bits, count=count, bitorder="little").view(bool)
        masks[name] = torch.from_numpy(kept).view(packed.shape)
    return masks


def encode_task(theta: Mapping[str, Tensor], recipe: Recipe, masks: Masks) -> Payload:
    """What a client needs of theta_r: kept values, the recipe and, for topk, the mask's bits."""
    arrays = encode_values(theta, masks)
    if recipe.needs_theta:
        arrays |= encode_bits(masks)
    return Payload(arrays, recipe.to_metrics())


def decode_task(
    payload: Payload, theta: Mapping[str, Tensor]
) -> tuple[Recipe, Masks, dict[str, Tensor]]:
    """The recipe, the mask and theta_{r,n,0} = theta_r * m; `theta` gives names and shapes."""
    recipe = Recipe.from_metrics(payload.numbers)
    shapes = {name: value.shape for name, value in theta.items()}
    bits = {k: v for k, v in payload.arrays.items() if k.startswith(MASK_PREFIX)}
    values = {k: v for k, v in payload.arrays.items() if not k.startswith(MASK_PREFIX)}
    masks = decode_bits(bits, shapes) if recipe.needs_theta else recipe.mask(theta)
    return recipe, masks, decode_values(values, shapes, masks)


def _floats(name: str, packed: Packed, expected: tuple[int, ...]) -> Tensor:
    if packed.dtype != "float32":
        raise UpdateError(f"{name} is sent as {packed.dtype!r}, not float32")
    if packed.shape != expected or len(packed.data) != 4 * math.prod(expected):
        raise UpdateError(
            f"{name} is sent with shape {packed.shape} and {len(packed.data)} bytes, "
            f"not {expected} and {4 * math.prod(expected)}"
        )
    with warnings.catch_warnings():  # read-only memory is fine: decoded values are only read
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.frombuffer(packed.data, np.float32)).view(expected)


def _expand(values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    return dense.masked_scatter_(mask, values)
