"""Moments as bytes: in fp32, or in four bits a value and less (wire.state).

Bits are saved where that does least harm. The first moment is mostly noise, since it is that of
minibatches, and rounding at random adds little to the noise. It takes four bits, with a scale for
each GROUP of kept values in their order (eight bits trained no better). The second moment is only a
step size, and neighbours have much the same one: its mean over each BLOCK of kept values travels,
in bf16. Biases and norms, which are few, keep one second moment for each value.

Values are grouped after the mask has been applied, so that groups are full under any mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.masks.mask import Mask
from fed_diffusion.protocol.codecs import Packed, from_bytes, round_at_random
from fed_diffusion.protocol.errors import DivergedError, UpdateError

LEVELS = 7
"""The largest level of four bits, on either side of 0."""
GROUP = 64
"""The number of values that share a scale of the first moment, at 2 bytes for each group."""
BLOCK = 8
"""The number of values that share a second moment, at 2 bytes for each block."""
BOUND = 7.3
"""The bound on |m| / sqrt(v), which is 7.27 for any gradients.

It follows from Cauchy and Schwarz with Adam's betas. Rounding must not undo it, or a first moment
would stand over a second moment of nearly 0.
"""


@dataclass(frozen=True)
class Moment:
    """One moment of a tensor, on its way into bytes.

    Attributes
    ----------
    codes
        The values, float32.
    form
        fp32 | int4.
    second
        Whether it is the second moment.
    wide
        Whether the whole tensor has two or more dimensions.
    """

    codes: Tensor
    form: str
    second: bool
    wide: bool

    def take(self, mask: Mask) -> Moment:
        """Return only what a mask keeps."""
        return replace(self, codes=mask.take(self.codes))

    def pack(self, stream: np.random.Philox) -> Packed:
        """Return the bytes that travel; a first moment of few bits draws its rounding from the
        stream.
        """
        shape, values = tuple(self.codes.shape), self.codes.contiguous().view(-1)
        if self.form == "fp32":
            return Packed("float32", shape, values.numpy().tobytes())
        if not self.second:
            return Packed(self.form, shape, _first_bytes(values, stream))
        held = _block_means(values) if self.wide else values
        return Packed("bfloat16", shape, _bf16_bytes(held.to(torch.bfloat16)))


def unpack_moment(
    name: str, packed: Packed, form: str, second: bool, wide: bool, expected: tuple[int, ...]
) -> Tensor:
    """Undo `Moment.pack`: return float32 values.

    Raises
    ------
    UpdateError
        A type, shape or length is not as agreed on, or a second moment or a scale is
        negative or, as `DivergedError`, not finite.
    """
    count = math.prod(expected)
    dtype, length = _layout(count, form, second, wide)
    if (packed.dtype, packed.shape, len(packed.data)) != (dtype, expected, length):
        raise UpdateError(
            f"{name} is sent as {packed.dtype} {packed.shape} of {len(packed.data)} bytes, "
            f"not {dtype} {expected} of {length}"
        )
    if form == "fp32":
        values = from_bytes(packed.data, torch.float32)
    elif not second:
        values = _first_of(name, packed.data, count)
    else:
        held = from_bytes(packed.data, torch.bfloat16).to(torch.float32)
        values = held.repeat_interleave(BLOCK)[:count] if wide else held
    if second:
        _check_positive(f"{name} holds values", values)
    return values.view(expected)


def _layout(count: int, form: str, second: bool, wide: bool) -> tuple[str, int]:
    """Return the type and the number of bytes in which so many values travel."""
    if form == "fp32":
        return "float32", 4 * count
    if second:
        return "bfloat16", 2 * (-(-count // BLOCK) if wide else count)
    return form, 2 * -(-count // GROUP) + (count + 1) // 2


def _first_of(name: str, data: bytes | memoryview, count: int) -> Tensor:
    cut = 2 * -(-count // GROUP)
    scales = from_bytes(data[:cut], torch.bfloat16).to(torch.float32)
    _check_positive(f"{name} has scales", scales)
    return _codes_of(data[cut:], count) * scales.repeat_interleave(GROUP)[:count]


def bounded(first: Tensor, second: Tensor) -> Tensor:
    """Return a first moment within what its second moment allows."""
    most = second.sqrt() * BOUND
    return torch.minimum(torch.maximum(first, -most), most)


def _check_positive(what: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise DivergedError(f"{what} that are not finite")
    if bool((values < 0).any()):
        raise UpdateError(f"{what} that are negative")


def _first_bytes(values: Tensor, stream: np.random.Philox) -> bytes:
    rows = torch.nn.functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    scales = _up_to_bf16(torch.linalg.vector_norm(rows, math.inf, dim=1) / LEVELS)
    scaled = rows / torch.where(scales > 0, scales, 1)[:, None]
    codes = torch.empty(rows.numel(), dtype=torch.int8)
    round_at_random(scaled.view(-1), codes, stream, LEVELS)
    return _bf16_bytes(scales.to(torch.bfloat16)) + _code_bytes(codes[: len(values)])


def _code_bytes(codes: Tensor) -> bytes:
    """Return two codes to a byte."""
    halves = torch.nn.functional.pad(codes, (0, len(codes) % 2)).numpy().view(np.uint8) & 15
    return bytes(halves[0::2] | halves[1::2] << 4)


def _codes_of(data: bytes | memoryview, count: int) -> Tensor:
    pairs = np.frombuffer(data, np.uint8)
    halves = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[:count].astype(np.int8)
    return torch.from_numpy(np.where(halves > 7, halves - 16, halves))


def _up_to_bf16(values: Tensor) -> Tensor:
    """Return the next larger values that bf16 holds, so that no value is beyond the largest
    level.
    """
    bits = values.contiguous().view(torch.int32) + 0xFFFF
    return torch.bitwise_and(bits, -0x10000).view(torch.float32)


def _block_means(values: Tensor) -> Tensor:
    """Return means over blocks; the last block may be shorter."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    counts = torch.full((len(blocks),), BLOCK, dtype=torch.float32)
    if rest := len(values) % BLOCK:
        counts[-1] = rest
    return blocks.sum(1) / counts


def _bf16_bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.int16).numpy().tobytes()
