"""Sums that have the same bits in any order and grouping, because they are whole numbers.

Values are kept in fixed point with 40 fractional bits, and integer addition is associative. With
weights, such as numbers of examples, the sums are sum(m w theta) / 2^s. The shift s follows from
the number of workers and the heaviest weight that there can be, which are known before the first
update: so every update has room for values up to 64, whatever its weight. A weighted value is
rounded once; that is within 2^(s-41) / w of the value itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.update import FRACTION_BITS, Room
from fed_diffusion.masks.mask import Mask

SCALE = 2.0**FRACTION_BITS
ALIGNED = 1.5 * 2.0 ** (52 - FRACTION_BITS)
"""Added to a float64, this leaves the value's 40 fractional bits at the end of the mantissa."""
ALIGNED_BITS = int(np.float64(ALIGNED).view(np.int64))
ALIGNED_LIMIT = 2.0 ** (51 - FRACTION_BITS)
BLOCK = 1 << 16
"""The number of coordinates handled at once: the float64 temporaries then stay in cache."""


@dataclass
class _Pending:
    """Sums over one block that are not yet in their place in the whole tensor."""

    mask: Mask
    sums: Tensor


class ExactSums:
    """sum(m w value) of every coordinate, int64, in O(D) memory whatever the number of updates.

    Parameters
    ----------
    theta
        Tensors by name; only their shapes count.
    room
        The share of each update in the sums' range.
    """

    def __init__(self, theta: Mapping[str, Tensor], room: Room):
        self.room = room
        self._sums = {n: torch.zeros(v.shape, dtype=torch.int64) for n, v in theta.items()}
        self._pending: dict[str, _Pending] = {}

    def add(self, values: Mapping[str, Tensor], masks: Mapping[str, Mask], weight: int) -> None:
        """Add an update and check each part on the way; a bad part takes out again all that went
        before.

        Whole numbers come out as they went in, and a separate check would read every value twice.

        Parameters
        ----------
        values, masks
            On the CPU, as `check_update` has let them through; a mask for every name.

        Raises
        ------
        UpdateError
            A value is not finite or beyond the update's share; nothing has been added then.
        """
        done: list[tuple[Tensor, Tensor, Tensor | None]] = []
        factor, limit = weight * self.room.scale, self.room.share
        for name, value in values.items():
            mask = masks[name]
            sums = self._block_sums(name, mask) if mask.shrinks else self._sums[name]
            end, largest = _add_fixed_point(sums, value, mask.bools, factor, limit)
            if end == sums.numel():
                done.append((sums, value, mask.bools))
                continue
            _add_fixed_point(sums, value, mask.bools, -factor, limit, end)
            for added in done:
                _add_fixed_point(*added, -factor, limit)
            self.room.refuse(name, largest, weight)
        self.room.take()

    def fill(self, name: str, sums: Tensor) -> None:
        """Take a tensor's sums as they are: those that secure aggregation has made.

        Parameters
        ----------
        sums
            int64, as `fixed_point` makes them of each update.
        """
        self._pending.pop(name, None)
        self._sums[name] = sums

    def _block_sums(self, name: str, mask: Mask) -> Tensor:
        """Return sums of blocks, which are dense while the same block follows, as for equal
        workers.
        """
        pending = self._pending.get(name)
        if pending is None or pending.mask != mask:
            self._settle(name)
            pending = _Pending(mask, torch.zeros(mask.kept, dtype=torch.int64))
            self._pending[name] = pending
        return pending.sums

    def _settle(self, name: str) -> None:
        """Bring a tensor's pending sums to their place."""
        if (pending := self._pending.pop(name, None)) is not None:
            pending.mask.add(pending.sums, self._sums[name])

    def __getitem__(self, name: str) -> Tensor:
        """Return the sums of one tensor, times 2^40 `room.scale`; do not write to them."""
        self._settle(name)
        return self._sums[name]


def _add_fixed_point(
    sums: Tensor,
    value: Tensor,
    mask: Tensor | None,
    factor: float,
    limit: float,
    end: int | None = None,
) -> tuple[int, float]:
    """Do sums += round(factor value 2^40) where the mask keeps, in cache-sized parts up to `end`.

    The function stops before a part with a magnitude of `limit` / |factor| or more, or one that is
    not finite. It returns where it ended, and the largest magnitude of the part it looked at last.
    It uses NumPy, which converts while it adds: a third of the passes over memory.
    """
    flat = value.detach().reshape(-1)
    values = (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()
    target = sums.view(-1).numpy()[:end]
    kept = None if mask is None else mask.reshape(-1).numpy()
    compact = kept is not None and len(values) != len(kept)
    scaled = np.empty(min(BLOCK, len(target)))
    spread = np.empty(len(scaled), values.dtype)
    taken, largest = 0, 0.0
    for start in range(0, len(target), BLOCK):
        there = target[start : start + BLOCK]
        if kept is None:
            here = part = values[start : start + BLOCK]
        else:
            places = np.flatnonzero(kept[start : start + BLOCK])
            here = values[taken : taken + len(places)] if compact else values[start:][places]
            taken += len(places)
            part = spread[: len(there)]
            part.fill(0)
            part[places] = here
        largest = _largest(here)
        if not largest * abs(factor) < limit:
            return start, largest
        there += _fixed_point(part, scaled[: len(there)], largest, factor)
    return len(target), largest


def fixed_point(name: str, values: Tensor, weight: int, room: Room) -> np.ndarray:
    """round(weight values 2^40), times `room.scale`, as `ExactSums` adds it: int64, flat.

    Raises
    ------
    UpdateError
        Values of the tensor `name` are not finite, or beyond an update's share.
    """
    flat = values.detach().reshape(-1).numpy()
    fixed, factor = np.empty(len(flat), np.int64), weight * room.scale
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        largest = _largest(part)
        if not largest * abs(factor) < room.share:
            room.refuse(name, largest, weight)
        here = fixed[start : start + BLOCK]
        here[:] = _fixed_point(part, np.empty(len(part)), largest, factor)
    return fixed


def _largest(values: np.ndarray) -> float:
    """Return the largest magnitude; NaN and infinities come through."""
    if not len(values):
        return 0.0
    low, high = float(values.min()), float(values.max())
    return max(-low, high) if low == low else low


def _fixed_point(
    values: np.ndarray, out: np.ndarray, largest: float, factor: float = 1.0
) -> np.ndarray:
    """Return round(factor values 2^40), halves to even, as int64 in the memory of `out`.

    The sum with `ALIGNED` is rounded to 40 fractional bits by the processor, and its bits are the
    whole number wanted, but for those of `ALIGNED`: 2 operations in place of 3, and no conversion.
    """
    fixed = out.view(np.int64)
    if factor != 1:
        values = np.multiply(values, factor, out=out, dtype=np.float64)
    if largest * abs(factor) < ALIGNED_LIMIT:
        np.add(values, ALIGNED, out=out, dtype=np.float64)
        fixed -= ALIGNED_BITS
    else:
        np.multiply(values, SCALE, out=out, dtype=np.float64)
        fixed[:] = np.rint(out)
    return fixed
