"""Equation (8) for theta and, by the same rule, for the optimiser state behind it.

Second moments are tiny: of gradients of 1e-6 they are 1e-12, the unit of the sums of `exact`. So
values are summed in parts, each exactly: their 40 fractional bits, 46 further ones, and so on while
anything is left. With uniform weights a mean over one worker alone is its value to the bit, and so
one client with shared state is one run of Adam.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.exact import SCALE, ExactSums
from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.update import Room, check_update
from fed_diffusion.masks.mask import Mask, Masks
from fed_diffusion.protocol.moments import MOST_STEPS, STEPS, parameter_of, spread

REST = 2.0**46
"""40 fractional bits leave at most 2^-41 of a value, which is at most 32 times this.

There is always room for the rest where there is room for the value.
"""
LEVELS = 4
"""The most parts of a float32 value: 40 + 3 * 46 fractional bits hold the smallest one."""
STEP = 16 / MOST_STEPS
"""The unit in which counts are summed, so that there is room for any number of workers."""


class StatefulMean(MaskedMean):
    """The coordinate-wise mean (8) of theta and of the state, in O(D) memory.

    Updates are mappings that hold both, as are the results; masks are theta's. An update is added
    whole or not at all.

    Parameters
    ----------
    theta, state
        What coordinates that nobody trained keep.
    workers, heaviest
        See `MaskedMean`.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        workers: int = 1024,
        heaviest: int = 1,
    ):
        super().__init__({**theta, **state}, workers, heaviest)
        self._rest_room = Room(workers, heaviest)
        self._rests: dict[str, list[ExactSums]] = {name: [] for name in self._theta}
        self.coverage = Coverage(theta, workers)

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        """Add one worker's theta_{r,n,S} and its state under its masks; see `MaskedMean.add`."""
        masks = masks or {}
        whole = self._room.check(weight)
        self._add(self._theta, values, masks, whole)
        self.coverage.add(masks, whole)

    def add_steps(self, steps: Mapping[str, Tensor], masks: Masks, weight: int) -> None:
        """Add the step counts alone, which the server knows, of an update that `fill` has added."""
        self._add({n: v for n, v in self._theta.items() if n in steps}, steps, masks, weight)

    def _add(
        self, theta: Mapping[str, Tensor], values: Mapping[str, Tensor], masks: Masks, weight: int
    ) -> None:
        values = {name: value.detach().cpu() * _unit(name) for name, value in values.items()}
        checked = check_update(theta, values, spread(masks, theta))
        coarse = {name: _coarse(value) for name, value in values.items()}
        self._sums.add(coarse, checked, weight)
        for name, part in coarse.items():
            self._add_rest(name, _rest(values[name], part), checked[name], weight)

    def fill(self, name: str, sums: Tensor, level: int = 0) -> None:
        """Take the sums of a part of a tensor, as `parts_of` says; see `MaskedMean.fill`."""
        if level == 0:
            super().fill(name, sums)
            return
        rests = self._rests[name]
        while len(rests) < level:
            rests.append(ExactSums({name: self._theta[name]}, self._rest_room))
        rests[level - 1].fill(name, sums)

    def _add_rest(self, name: str, rest: Tensor, mask: Mask, weight: int) -> None:
        """Add what is left of a tensor, part by part; sums are made only for parts that exist."""
        parts = self._rests[name]
        for level in itertools.count():
            if not bool(rest.any()):
                return
            if level == len(parts):
                parts.append(ExactSums({name: self._theta[name]}, self._rest_room))
            coarse = _coarse(rest)
            parts[level].add({name: coarse}, {name: mask}, weight)
            rest = _rest(rest, coarse)

    def _counts(self, name: str) -> tuple[int, Tensor | None]:
        return self.coverage.weights(parameter_of(name))

    def _total(self, name: str, block: slice) -> Tensor:
        total, unit = super()._total(name, block), 1 / (SCALE * self._room.scale)
        for sums in self._rests[name]:
            unit /= REST
            total += sums[name].view(-1)[block].to(torch.float64) * unit
        return total * (1 / _unit(name))


def _unit(name: str) -> float:
    return STEP if name.startswith(STEPS) else 1.0


def parts_of(value: Tensor) -> list[Tensor]:
    """Return the `LEVELS` parts in which values are summed, which are values of their own."""
    parts = []
    for _ in range(LEVELS):
        parts.append(_coarse(value))
        value = _rest(value, parts[-1])
    return parts


def _coarse(value: Tensor) -> Tensor:
    """Return values rounded to 40 fractional bits, which float32 can hold."""
    return ((value.double() * SCALE).round_() / SCALE).float()


def _rest(value: Tensor, coarse: Tensor) -> Tensor:
    """Return what rounding left, times 2^46: no bit is lost."""
    return ((value.double() - coarse.double()) * REST).float()
