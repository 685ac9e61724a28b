"""Equation (8): each coordinate is averaged over the workers that trained it.

(8) is a ratio of two additive sums, sum(m theta) and sum(m). Both are kept as integers (values in
fixed point with 40 fractional bits), and integer addition is associative: the result has the same
bits in any order and grouping of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.models.layout import Block

FRACTION_BITS = 40
SCALE = 2.0**FRACTION_BITS
LIMIT = 2.0 ** (63 - FRACTION_BITS)
"""Bound on a coordinate's weighted sum of magnitudes, so that int64 cannot overflow."""
BLOCK = 1 << 17
"""Coordinates handled at once: the float64 temporaries stay in cache."""


class UpdateError(ValueError):
    """An update that must not count; the message says what is wrong with it."""


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

    Examples
    --------
    >>> mean = MaskedMean({"w": torch.zeros(2)})
    >>> mean.add({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([True, False])})
    >>> mean.add({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([True, False])})
    >>> mean.result()
    {'w': tensor([2., 0.])}
    """

    def __init__(self, theta: Mapping[str, Tensor], workers: int = 1024):
        self._theta = dict(theta)
        self._limit = LIMIT / workers
        self._room = workers
        self._sums = {n: torch.zeros(v.shape, dtype=torch.int64) for n, v in self._theta.items()}
        # Unmasked tensors are counted by one number; a tensor of counts exists only where needed.
        self._weight = dict.fromkeys(self._theta, 0)
        self._workers = dict.fromkeys(self._theta, 0)
        self._weights: dict[str, Tensor] = {}
        self._trainers: dict[str, Tensor] = {}
        self._pending: dict[str, _Pending] = {}
        self._bytes: dict[str, list[Any]] = {}

    def add(
        self,
        values: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | Block] | None = None,
        weight: float = 1.0,
        *,
        dropped_are_zero: bool = False,
    ) -> None:
        """Add one worker's theta_{r,n,S} under its mask.

        Parameters
        ----------
        values
            Float tensors by theta's names, shaped like theta (what the mask drops is not read) or,
            where the mask is a block, like the block.
        masks
            Bool tensors or blocks by name; a name that is missing is kept whole.
        weight
            A positive whole number (equation (8) has 1).
        dropped_are_zero
            Whole values are zero where a mask drops (as decoded ones are): half of the work.

        Raises
        ------
        UpdateError
            Wrong names, shapes or dtype, values that are not finite or beyond 2^23 / workers:
            nothing of the update has been added then.
        """
        masks = masks or {}
        whole = int(weight)
        if whole != weight or whole < 1:
            raise UpdateError(f"weight = {weight}; it must be a positive whole number")
        self._check(values, masks, whole, dropped_are_zero)
        self._room -= 1
        for name, value in values.items():
            mask = masks.get(name)
            if isinstance(mask, Block):
                self._add_block(name, value, mask, whole)
            else:
                _add_fixed_point(self._sums[name], value, None if dropped_are_zero else mask, whole)
                self._count(name, mask, whole)

    def _add_block(self, name: str, value: Tensor, block: Block, weight: int) -> None:
        """Blocks are summed densely while one like the last follows, as for workers of one size."""
        pending = self._pending.get(name)
        if pending is None or pending.block.runs != block.runs:
            self._settle(name)
            pending = _Pending(block, torch.zeros(block.kept, dtype=torch.int64))
            self._pending[name] = pending
        _add_fixed_point(pending.sums, value, None, weight)
        pending.weight += weight
        pending.workers += 1

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
        dropped_are_zero: bool,
    ) -> None:
        if self._room < 1 or weight >= self._limit:
            raise UpdateError(f"no room for this update (weight {weight}); see `workers`")
        if values.keys() != self._theta.keys():
            odd = sorted(values.keys() ^ self._theta.keys())[:3]
            raise UpdateError(f"tensor names differ from the model's, first of them: {odd}")
        if unknown := sorted(masks.keys() - self._theta.keys())[:3]:
            raise UpdateError(f"masks for tensors the model lacks, first of them: {unknown}")
        for name, value in values.items():
            shape, mask = tuple(self._theta[name].shape), masks.get(name)
            expected = mask.kept if isinstance(mask, Block) else shape
            if tuple(value.shape) != expected or not value.is_floating_point():
                raise UpdateError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, not floating {expected}"
                )
            if mask is not None and tuple(mask.shape) != shape:
                raise UpdateError(f"the mask of {name} is not of shape {shape}")
            if isinstance(mask, Tensor) and mask.dtype != torch.bool:
                raise UpdateError(f"the mask of {name} is {mask.dtype}, not bool {shape}")
            largest = _largest(value, None if dropped_are_zero else mask)
            if not largest < float("inf"):
                raise UpdateError(f"{name} holds values that are not finite")
            if largest * weight >= self._limit:
                raise UpdateError(
                    f"{name} holds values as large as {largest:.3g} (weight {weight}): "
                    f"beyond {self._limit:g}"
                )

    def _count(self, name: str, mask: Tensor | Block | None, weight: int, workers: int = 1) -> None:
        if mask is None:
            self._weight[name] += weight
            self._workers[name] += workers
            return
        shape = self._theta[name].shape
        if name not in self._trainers:
            self._trainers[name] = torch.zeros(shape, dtype=torch.int32)
        if weight == workers == 1 and name not in self._weights and isinstance(mask, Tensor):
            self._count_bytes(name, mask)
            return
        self._settle_counts(name)
        if weight != workers and name not in self._weights:  # so far every weight was 1
            self._weights[name] = self._trainers[name].to(torch.int64)
        _count_in(self._trainers[name], mask, workers)
        if name in self._weights:
            _count_in(self._weights[name], mask, weight)

    def _count_bytes(self, name: str, mask: Tensor) -> None:
        """Masks are bytes of 0 and 1: up to 255 of them add up in bytes, which is fastest."""
        if name not in self._bytes:
            self._bytes[name] = [torch.zeros(mask.shape, dtype=torch.uint8), 0]
        counted = self._bytes[name]
        counted[0] += mask.view(torch.uint8)
        counted[1] += 1
        if counted[1] == 255:
            self._settle_counts(name)

    def _settle_counts(self, name: str) -> None:
        if name in self._bytes:
            self._trainers[name] += self._bytes.pop(name)[0]

    def result(self) -> dict[str, Tensor]:
        """theta_{r+1}: the mean where somebody trained, theta_r elsewhere; float32."""
        self._settle_all()
        return {name: self._mean(name) for name in self._theta}

    def _settle_all(self) -> None:
        for name in list(self._pending):
            self._settle(name)
        for name in list(self._bytes):
            self._settle_counts(name)

    def _mean(self, name: str) -> Tensor:
        old = self._theta[name]
        new = torch.empty_like(old).flatten()
        sums, flat = self._sums[name].flatten(), old.flatten()
        weights = self._weights.get(name, self._trainers.get(name))
        counts = sums if weights is None else weights.flatten()
        for start in range(0, flat.numel(), BLOCK):
            block = slice(start, start + BLOCK)
            total = sums[block].to(torch.float64)
            total *= 1 / SCALE  # exact: a power of two
            if weights is None:
                weight = self._weight[name]
                new[block] = total.div_(weight) if weight else flat[block]
            else:
                count = counts[block] + self._weight[name]
                new[block] = total.div_(count.clamp(min=1))
                if int(count.min()) == 0:
                    new[block] = torch.where(count > 0, new[block], flat[block])
        return new.view(old.shape)

    def coverage(self) -> dict[str, Tensor]:
        """|N_r^i| for every coordinate i: how many workers trained it (int32, theta's shapes)."""
        self._settle_all()
        return {
            name: self._workers[name] + self._trainers.get(name, torch.zeros(1, dtype=torch.int32))
            if name in self._trainers
            else torch.full(self._theta[name].shape, self._workers[name], dtype=torch.int32)
            for name in self._theta
        }

    def gamma(self) -> int:
        """Gamma_r = min_i |N_r^i|."""
        self._settle_all()
        return min(
            self._workers[name] + (int(self._trainers[name].min()) if name in self._trainers else 0)
            for name in self._theta
        )

    def trained(self) -> float:
        """The fraction of coordinates with at least one trainer."""
        self._settle_all()
        total = sum(value.numel() for value in self._theta.values())
        bare = sum(
            (int((self._trainers[n] == 0).sum()) if n in self._trainers else v.numel())
            for n, v in self._theta.items()
            if not self._workers[n]
        )
        return 1 - bare / total


def _count_in(counts: Tensor, mask: Tensor | Block, weight: int) -> None:
    """counts += weight where the mask keeps."""
    if isinstance(mask, Block):
        for there, _ in mask.pieces():
            counts[there] += weight
    else:
        counts.add_(mask, alpha=weight)


def _largest(value: Tensor, mask: Tensor | Block | None) -> float:
    """The largest kept magnitude; NaN and infinities come through."""
    if value.numel() == 0:
        return 0.0
    if isinstance(mask, Tensor):
        value = value.where(mask, 0)
    low, high = torch.aminmax(value)
    return max(-float(low), float(high)) if low == low else float("nan")


def _add_fixed_point(sums: Tensor, value: Tensor, mask: Tensor | None, weight: int) -> None:
    """sums += weight * round(value 2^40) where the mask keeps, in cache-sized parts."""
    flat, target = value.detach().reshape(-1), sums.view(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.float()  # half precision does not reach 2^40
    kept = None if mask is None else mask.flatten()
    size = min(BLOCK, len(flat))
    scaled, fixed = torch.empty(size, dtype=flat.dtype), torch.empty(size, dtype=torch.int64)
    for start in range(0, len(flat), BLOCK):
        values = flat[start : start + BLOCK]
        # Scaling by a power of two is exact; rounding is then at most 2^-41 of the value's unit.
        torch.mul(values, SCALE, out=scaled[: len(values)]).round_()
        part = fixed[: len(values)].copy_(scaled[: len(values)])
        if kept is not None:
            part *= kept[start : start + BLOCK]
        target[start : start + BLOCK].add_(part, alpha=weight)
