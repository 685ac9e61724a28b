"""Values as bytes: fp32, bf16, fp16, or int8 with scales and unbiased random rounding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.masks.mask import Mask, Masks, mask_of
from fed_diffusion.protocol.errors import UpdateError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
"""The names of the types on the wire."""
LEVELS = 127
CHUNK = 1 << 18
"""The number of values that are rounded at once: the temporaries then stay in cache."""
PART = 1 << 16
"""The number of values whose differences are squared at once, for the same reason."""


@dataclass(frozen=True)
class Packed:
    """One tensor on the wire: values (int8 with its float32 scales in front), or packed bits."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class Cast:
    """Values in the type in which they travel.

    Attributes
    ----------
    codes
        The values in the type's torch dtype.
    scales
        For int8: float32, one per row (`codes[i] * scales[i]` are the values) or a single one.
    """

    dtype: str
    codes: Tensor
    scales: Tensor | None = None

    def take(self, mask: Mask) -> Cast:
        """Return only what a mask keeps: a block's rows with their scales, or single values in
        order.
        """
        scales = self.scales
        if scales is not None and len(scales) > 1:
            scales = mask.rows(scales)
        return Cast(self.dtype, mask.take(self.codes), scales)

    def pack(self) -> Packed:
        """Return the bytes that travel, little-endian."""
        codes = self.codes.contiguous()
        raw = codes.view(torch.int16) if self.dtype == "bf16" else codes  # NumPy has no bfloat16
        data = raw.numpy().tobytes()
        if self.scales is not None:
            data = self.scales.numpy().tobytes() + data
        return Packed(NAMES[self.dtype], tuple(codes.shape), data)


def cast(values: Tensor, dtype: str, per_row: bool, stream: np.random.Philox | None) -> Cast:
    """Return values in the type `dtype`; int8 rounds up or down at random, exact on average.

    Parameters
    ----------
    values
        float32 on the CPU.
    dtype
        fp32 | bf16 | fp16 | int8.
    per_row
        int8: a scale for each index of the first of two or more dimensions; else a single one.
    stream
        int8: where the rounding's randomness comes from, four values a word.
    """
    if dtype != "int8":
        return Cast(dtype, values.to(DTYPES[dtype]))
    assert stream is not None
    if values.numel() == 0:
        return Cast(dtype, values.to(torch.int8), torch.zeros(1))
    rows = values.contiguous().view(len(values) if per_row and values.dim() > 1 else 1, -1)
    scales = torch.linalg.vector_norm(rows, math.inf, dim=1) / LEVELS
    divisor = torch.where(scales > 0, scales, 1)
    scaled = (rows / divisor[:, None]).view(-1)
    codes = torch.empty(scaled.shape, dtype=torch.int8)
    for start in range(0, len(scaled), CHUNK):
        round_at_random(scaled[start : start + CHUNK], codes[start : start + CHUNK], stream)
    return Cast(dtype, codes.view(values.shape), scales)


def round_at_random(
    scaled: Tensor, out: Tensor, stream: np.random.Philox, levels: int = LEVELS
) -> None:
    """Write floor(x + U) with U uniform in 65,536 steps: x on average. `scaled` is used up."""
    words = np.asarray(stream.random_raw(-(-len(scaled) // 4)))
    uniform = torch.from_numpy(words.view(np.uint16)[: len(scaled)].astype(np.float32))
    out.copy_(scaled.add_(uniform, alpha=2.0**-16).floor_().clamp_(-levels, levels))


def unpack(
    name: str, packed: Packed, dtype: str, expected: tuple[int, ...], per_row: bool
) -> Tensor:
    """Return the float32 values of a tensor that came over the network.

    Parameters
    ----------
    name
        For the message.
    dtype, per_row
        As agreed on; see `cast`.
    expected
        The shape that the mask implies.

    Raises
    ------
    UpdateError
        A type, shape or length is not as agreed on, or a scale is negative or not finite.
    """
    if packed.dtype != NAMES[dtype]:
        raise UpdateError(f"{name} is sent as {packed.dtype!r}, not {NAMES[dtype]}")
    rows = 0
    if dtype == "int8":
        rows = expected[0] if per_row and len(expected) > 1 else 1
    length = 4 * rows + DTYPES[dtype].itemsize * math.prod(expected)
    if packed.shape != expected or len(packed.data) != length:
        raise UpdateError(
            f"{name} is sent with shape {packed.shape} and {len(packed.data)} bytes, "
            f"not {expected} and {length}"
        )
    if dtype != "int8":
        return from_bytes(packed.data, DTYPES[dtype]).view(expected).to(torch.float32)
    scales = from_bytes(packed.data[: 4 * rows], torch.float32)
    if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
        raise UpdateError(f"{name} has scales that are negative or not finite")
    codes = from_bytes(memoryview(packed.data)[4 * rows :], torch.int8)
    return (codes.view(rows, -1) * scales[:, None]).view(expected)


def from_bytes(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """Return the values that bytes hold, without a copy; do not write to them."""
    if len(data) == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():  # read-only memory is fine: decoded values are only read
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype)


def difference(
    values: Mapping[str, Tensor], theta: Mapping[str, Tensor], masks: Masks
) -> tuple[float, int]:
    """Return the squared norm of kept values - theta where the mask keeps, and how many there
    are.
    """
    square, count = 0.0, 0
    wide = np.empty(PART)
    for name, value in values.items():
        began = mask_of(masks, name, theta[name]).take(theta[name])
        ours, theirs = (t.detach().float().reshape(-1).numpy() for t in (value, began))
        for start in range(0, len(ours), PART):
            here = ours[start : start + PART]
            with np.errstate(all="ignore"):  # what is not finite is refused by the caller
                change = np.subtract(here, theirs[start : start + PART], out=wide[: len(here)])
                square += float(np.einsum("i,i->", change, change))
        count += value.numel()
    return square, count
