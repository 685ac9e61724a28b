"""Equation (8): each coordinate is averaged over the workers that trained it.

(8) is a ratio of two additive sums, sum(m theta) and sum(m). Both are kept as integers (values in
fixed point with 40 fractional bits), and integer addition is associative: the result has the same
bits in any order and grouping of arrival.

With weights, such as numbers of examples, the sums are sum(m w theta) / 2^s and sum(m w). The shift
s follows from the number of workers and the heaviest weight that there can be, which are known
before the first update: so every update has room for values up to 64, whatever its weight. A
weighted value is rounded once; that is within 2^(s-41) / w of the value itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.masks.recipe import kept_count
from fed_diffusion.masks.spaces import Block
from fed_diffusion.protocol.errors import DivergedError, LimitError, RangeError, UpdateError

FRACTION_BITS = 40
SCALE = 2.0**FRACTION_BITS
LIMIT = 2.0 ** (63 - FRACTION_BITS)
"""Bound on a coordinate's weighted sum of magnitudes, so that int64 cannot overflow."""
ALIGNED = 1.5 * 2.0 ** (52 - FRACTION_BITS)
"""Added to a float64, it leaves the value's 40 fractional bits at the end of the mantissa."""
ALIGNED_BITS = int(np.float64(ALIGNED).view(np.int64))
ALIGNED_LIMIT = 2.0 ** (51 - FRACTION_BITS)
VALUES = 64.0
"""Magnitude of values for which there is room at any weight; networks stay far below it."""
BLOCK = 1 << 16
"""Coordinates handled at once: the float64 temporaries stay in cache."""


@dataclass
class _Pending:
    """Sums over one block, not yet in their place in the whole tensor."""

    block: Block
    sums: Tensor
    weight: int = 0
    workers: int = 0


class MaskedMean:
    """The coordinate-wise mean (8), streamed in O(D) memory whatever the number of workers.

    Parameters
    ----------
    theta
        The current parameters by name (float32); coordinates that nobody trained keep them.
    workers
        The most updates that will be added. Each may use an equal share of the sums' range, so
        that whether one is accepted does not depend on what came before it.
    heaviest
        The largest weight of an update. At all weights up to it there is room for values up to 64.

    Examples
    --------
    >>> mean = MaskedMean({"w": torch.zeros(2)})
    >>> mean.add({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([True, False])})
    >>> mean.add({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([True, False])})
    >>> mean.result()
    {'w': tensor([2., 0.])}
    """

    def __init__(self, theta: Mapping[str, Tensor], workers: int = 1024, heaviest: int = 1):
        self._theta = dict(theta)
        self._limit = LIMIT / workers
        self._scale = 2.0 ** -max(0, math.ceil(math.log2(workers * heaviest * VALUES / LIMIT)))
        self._room = workers
        self._sums = {n: torch.zeros(v.shape, dtype=torch.int64) for n, v in self._theta.items()}
        # Unmasked tensors are counted by one number; a tensor of counts exists only where needed.
        self._weight = dict.fromkeys(self._theta, 0)
        self._workers = dict.fromkeys(self._theta, 0)
        self._weights: dict[str, Tensor] = {}
        self._trainers: dict[str, Tensor] = {}
        # up to 255 masks add up as the bytes they are, which is fastest and smallest
        self._counts = torch.uint8 if workers < 256 else torch.int32
        self._pending: dict[str, _Pending] = {}

    def add(
        self,
        values: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | Block] | None = None,
        weight: float = 1.0,
    ) -> None:
        """Add one worker's theta_{r,n,S} under its mask.

        Parameters
        ----------
        values
            Float tensors by theta's names, on any device, shaped like theta (what the mask drops is
            not read) or only the kept values: shaped like the block where the mask is one, else
            one-dimensional.
        masks
            Bool tensors or blocks by name; a name that is missing is kept whole.
        weight
            A positive whole number (equation (8) has 1).

        Raises
        ------
        UpdateError
            Wrong names, shapes or dtype, values that are not finite, or times their weight beyond
            the update's share of the sums' range: nothing of the update has been added then.
        """
        values = {name: value.detach().cpu() for name, value in values.items()}
        masks = {n: m.cpu() if isinstance(m, Tensor) else m for n, m in (masks or {}).items()}
        whole = int(weight)
        if whole != weight or whole < 1:
            raise UpdateError(f"weight = {weight}; it must be a positive whole number")
        self._check(values, masks, whole)
        self._add_values(values, masks, whole)
        self._room -= 1
        for name in values:
            mask = masks.get(name)
            if isinstance(mask, Block):
                self._pending[name].weight += whole
                self._pending[name].workers += 1
            else:
                self._count(name, mask, whole)

    def _add_values(
        self, values: Mapping[str, Tensor], masks: Mapping[str, Tensor | Block], weight: int
    ) -> None:
        """Add, looking at each part on the way; what is bad takes out again all that went before.

        Whole numbers come out as they went in, and to look first would read every value twice.
        """
        done: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for name, value in values.items():
            mask = masks.get(name)
            bools = None if isinstance(mask, Block) else mask
            sums = self._block_sums(name, mask) if isinstance(mask, Block) else self._sums[name]
            factor = weight * self._scale
            end, largest = _add_fixed_point(sums, value, bools, factor, self._limit)
            if end == sums.numel():
                done.append((sums, value, bools))
                continue
            _add_fixed_point(sums, value, bools, -factor, self._limit, end)
            for added in done:
                _add_fixed_point(*added, -factor, self._limit)
            self._refuse(name, largest, weight)

    def _refuse(self, name: str, largest: float, weight: int) -> NoReturn:
        if not largest < float("inf"):
            raise DivergedError(f"{name} holds values that are not finite")
        room = self._limit / (weight * self._scale)
        kind = RangeError if largest < LIMIT else DivergedError
        raise kind(
            f"{name} holds values as large as {largest:.3g}: beyond {room:g}, the share of one "
            f"update of weight {weight} in the sums' range"
        )

    def _block_sums(self, name: str, block: Block) -> Tensor:
        """Blocks are summed densely while one like the last follows, as for workers of one size."""
        pending = self._pending.get(name)
        if pending is None or pending.block.runs != block.runs:
            self._settle(name)
            pending = _Pending(block, torch.zeros(block.kept, dtype=torch.int64))
            self._pending[name] = pending
        return pending.sums

    def _settle(self, name: str) -> None:
        """Bring a tensor's pending sums to their place."""
        pending = self._pending.pop(name, None)
        if pending is None:
            return
        for there, here in pending.block.pieces():
            self._sums[name][there] += pending.sums[here]
        self._count(name, pending.block, pending.weight, pending.workers)

    def _check(
        self,
        values: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | Block],
        weight: int,
    ) -> None:
        """Refuse an update that is not of this model; values are looked at as they are added."""
        if self._room < 1:
            raise LimitError("no room for this update: as many as were announced are in")
        if weight * self._scale >= self._limit:
            raise LimitError(f"no room for an update of weight {weight}; see `heaviest`")
        if values.keys() != self._theta.keys():
            odd = sorted(values.keys() ^ self._theta.keys())[:3]
            raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
        if unknown := sorted(masks.keys() - self._theta.keys())[:3]:
            raise UpdateError(f"masks for tensors the model lacks, first of them: {unknown}")
        for name, value in values.items():
            self._check_shape(name, value, masks.get(name))

    def _check_shape(self, name: str, value: Tensor, mask: Tensor | Block | None) -> None:
        shape = tuple(self._theta[name].shape)
        if mask is not None and tuple(mask.shape) != shape:
            raise UpdateError(f"the mask of {name} is not of shape {shape}")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise UpdateError(f"the mask of {name} is {mask.dtype}, not bool {shape}")
        expected = mask.kept if isinstance(mask, Block) else shape
        if isinstance(mask, Tensor) and tuple(value.shape) != shape:
            expected = (kept_count(mask),)
        if tuple(value.shape) != expected or not value.is_floating_point():
            raise UpdateError(
                f"{name} is {value.dtype} {tuple(value.shape)}, not floating {expected}"
            )

    def _count(self, name: str, mask: Tensor | Block | None, weight: int, workers: int = 1) -> None:
        if mask is None:
            self._weight[name] += weight
            self._workers[name] += workers
            return
        shape = self._theta[name].shape
        if name not in self._trainers:
            self._trainers[name] = torch.zeros(shape, dtype=self._counts)
        if weight != workers and name not in self._weights:  # so far every weight was 1
            self._weights[name] = self._trainers[name].to(torch.int64)
        count_in(self._trainers[name], mask, workers)
        if name in self._weights:
            count_in(self._weights[name], mask, weight)

    def result(self) -> dict[str, Tensor]:
        """theta_{r+1}: the mean where somebody trained, theta_r elsewhere; float32."""
        self._settle_all()
        return {name: self._mean(name) for name in self._theta}

    def _settle_all(self) -> None:
        for name in list(self._pending):
            self._settle(name)

    def _mean(self, name: str) -> Tensor:
        old = self._theta[name]
        new = torch.empty_like(old).flatten()
        sums, flat = self._sums[name].flatten(), old.flatten()
        weights = self._weights.get(name, self._trainers.get(name))
        counts = sums if weights is None else weights.flatten()
        for start in range(0, flat.numel(), BLOCK):
            block = slice(start, start + BLOCK)
            total = sums[block].to(torch.float64)
            total *= 1 / (SCALE * self._scale)  # exact: a power of two
            if weights is None:
                weight = self._weight[name]
                new[block] = total.div_(weight) if weight else flat[block]
            else:
                count = counts[block].to(torch.int64) + self._weight[name]
                new[block] = total.div_(count.clamp(min=1))
                if int(count.min()) == 0:
                    new[block] = torch.where(count > 0, new[block], flat[block])
        return new.view(old.shape)

    def coverage(self) -> dict[str, Tensor]:
        """|N_r^i| for every coordinate i: how many workers trained it (int32, theta's shapes)."""
        self._settle_all()
        return {
            name: self._trainers[name].to(torch.int32) + self._workers[name]
            if name in self._trainers
            else torch.full(value.shape, self._workers[name], dtype=torch.int32)
            for name, value in self._theta.items()
        }

    def gamma(self) -> int:
        """Gamma_r = min_i |N_r^i|."""
        self._settle_all()
        return min(
            self._workers[name] + (int(self._trainers[name].min()) if name in self._trainers else 0)
            for name in self._theta
        )

    def trainers(self) -> dict[int, int]:
        """How many coordinates have so many trainers: {|N_r^i|: coordinates}, no zeros, in order.

        The least key is Gamma_r; under 0 stand those that nobody trained.
        """
        self._settle_all()
        found: Counter[int] = Counter()
        for name, value in self._theta.items():
            if name in self._trainers:
                for count, coordinates in enumerate(torch.bincount(self._trainers[name].view(-1))):
                    found[self._workers[name] + count] += int(coordinates)
            else:
                found[self._workers[name]] += value.numel()
        return {count: found[count] for count in sorted(found) if found[count]}

    def trained(self) -> float:
        """The fraction of coordinates with at least one trainer."""
        counts = self.trainers()
        return 1 - counts.get(0, 0) / sum(counts.values())


def count_in(counts: Tensor, mask: Tensor | Block, weight: int) -> None:
    """counts += weight where the mask keeps."""
    if isinstance(mask, Block):
        for there, _ in mask.pieces():
            counts[there] += weight
    elif counts.dtype == torch.uint8 and weight == 1:
        counts += mask.view(torch.uint8)
    else:
        counts.add_(mask, alpha=weight)


def _add_fixed_point(
    sums: Tensor,
    value: Tensor,
    mask: Tensor | None,
    factor: float,
    limit: float,
    end: int | None = None,
) -> tuple[int, float]:
    """sums += round(factor value 2^40) where the mask keeps, in cache-sized parts up to `end`.

    Stops before a part with a magnitude of `limit` / |factor| or more, or one that is not finite.
    Returns where it ended, and the largest magnitude of the part it looked at last.
    NumPy, because it converts while it adds: a third of the passes over memory.
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


def _largest(values: np.ndarray) -> float:
    """The largest magnitude; NaN and infinities come through."""
    if not len(values):
        return 0.0
    low, high = float(values.min()), float(values.max())
    return max(-low, high) if low == low else low


def _fixed_point(
    values: np.ndarray, out: np.ndarray, largest: float, factor: float = 1.0
) -> np.ndarray:
    """round(factor values 2^40), halves to even, as int64 in the memory of the float64 `out`.

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
