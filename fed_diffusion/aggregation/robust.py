"""Averages that withstand lying clients: coordinate-wise trimmed mean and median, under masks.

They need every update of a round at once: 4 N D bytes for N whole updates of D coordinates, where
`MaskedMean` needs O(D). Their result does not depend on the order of arrival either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.update import Room, check_update, kept_part
from fed_diffusion.masks.mask import Mask, Masks
from fed_diffusion.protocol.errors import UpdateError

FEWEST = 3
"""The fewest values of which some can be left out at both ends; of one or two, none can."""
ROWS = 1 << 16
"""The number of coordinates sorted at once."""


class RobustMean:
    """The trimmed mean of each coordinate over the workers that trained it.

    Of n values the floor(trim n) smallest and as many of the largest are left out. From three
    values on that is at least one at either end, and at most so many that one or two remain; trim =
    1/2 is the median. Where one or two workers trained a coordinate, nothing can be left out: see
    `undefended`. Weights do not apply.

    Parameters
    ----------
    theta
        The current parameters; coordinates that nobody trained keep them.
    trim
        The part of the values that is left out at either end, above 0 and up to 1/2.
    workers
        The most updates that will be added. As in `MaskedMean` an update's values have their share
        of the range, so that the same updates are refused.
    """

    def __init__(self, theta: Mapping[str, Tensor], trim: float, workers: int = 1024):
        self._theta = dict(theta)
        self._trim = trim
        self._room = Room(workers)
        self.coverage = Coverage(self._theta, workers)
        self._updates: list[dict[str, tuple[Tensor, Mask]]] = []
        """For every update, each tensor's kept values and its mask."""

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        """Add one worker's values; raise `UpdateError` as `MaskedMean.add` does, and for
        weights.
        """
        if weight != 1:
            raise UpdateError(f"weight = {weight}; trimmed means and medians take no weights")
        values = {name: value.detach().cpu() for name, value in values.items()}
        masks = masks or {}
        self._room.check(weight)
        found = check_update(self._theta, values, masks)
        kept = {name: kept_part(value, found[name]) for name, value in values.items()}
        for name, value in kept.items():
            largest = float(torch.linalg.vector_norm(value, math.inf)) if value.numel() else 0.0
            if not largest * self._room.scale < self._room.share:
                self._room.refuse(name, largest, 1)
        self._room.take()
        self.coverage.add(masks)
        self._updates.append({n: (value.clone(), found[n]) for n, value in kept.items()})

    def result(self) -> dict[str, Tensor]:
        """Return theta_{r+1}: the trimmed mean where somebody trained, theta_r elsewhere;
        float32.
        """
        return {name: self._tensor(name) for name in self._theta}

    def _tensor(self, name: str) -> Tensor:
        old = self._theta[name]
        columns = []
        for update in self._updates:
            value, mask = update[name]
            columns.append(mask.put(value.float(), torch.full(mask.shape, math.inf)).flatten())
        new = old.flatten().clone()
        for start in range(0, new.numel(), ROWS):
            part = slice(start, start + ROWS)
            if columns:
                stacked = torch.stack([column[part] for column in columns], 1).double()
                new[part] = self._rows(stacked, new[part])
        return new.view(old.shape)

    def _rows(self, values: Tensor, old: Tensor) -> Tensor:
        """Return one coordinate per row; what was not trained is infinite, and sorts to the end."""
        ordered = values.sort(1).values
        count = torch.isfinite(ordered).sum(1)
        cut = (self._trim * count).floor().long().clamp(min=1)
        cut = torch.minimum(cut, (count - 1).clamp(min=0) // 2)
        place = torch.arange(values.shape[1])[None, :]
        inside = (place >= cut[:, None]) & (place < (count - cut)[:, None])
        total = ordered.masked_fill(~inside, 0).sum(1)
        mean = total / inside.sum(1).clamp(min=1)
        return torch.where(count > 0, mean, old.double()).float()


def undefended(trainers: Mapping[int, int]) -> int:
    """Return how many coordinates one liar decides on: those that one or two workers trained.

    Parameters
    ----------
    trainers
        |N_r^i| -> how many coordinates have so many trainers; see `Coverage.trainers`.
    """
    return sum(coordinates for count, coordinates in trainers.items() if 0 < count < FEWEST)
