"""How many workers trained each coordinate: |N_r^i|, and Gamma_r, the least of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_diffusion.masks.mask import Mask, Masks, mask_of


@dataclass
class _Pending:
    """Counts of one block that are not yet in their place in the whole tensor."""

    mask: Mask
    weight: int = 0
    workers: int = 0


class Coverage:
    """Counts the masks of the updates that were added.

    Parameters
    ----------
    theta
        Tensors by name; only their shapes count.
    workers
        The most updates that will be counted.

    Attributes
    ----------
    updates
        How many updates were counted.
    """

    def __init__(self, theta: Mapping[str, Tensor], workers: int = 1024):
        self._theta = theta
        # Unmasked tensors are counted by one number; a tensor of counts exists only where needed.
        self._weight = dict.fromkeys(theta, 0)
        self._workers = dict.fromkeys(theta, 0)
        self._weights: dict[str, Tensor] = {}
        self._trainers: dict[str, Tensor] = {}
        # up to 255 masks add up as the bytes they are, which is fastest and smallest
        self._counts = torch.uint8 if workers < 256 else torch.int32
        self._pending: dict[str, _Pending] = {}
        self.updates = 0

    def add(self, masks: Masks, weight: int = 1) -> None:
        """Count one update that was trained under these masks, with its weight."""
        self.updates += 1
        for name, whole in self._theta.items():
            mask = mask_of(masks, name, whole)
            if mask.shrinks:
                self._note(name, mask, weight)
            else:
                self._count(name, mask, weight)

    def _note(self, name: str, mask: Mask, weight: int) -> None:
        """Note a block; it is counted when another block follows, as workers come in few sizes."""
        pending = self._pending.get(name)
        if pending is None or pending.mask != mask:
            self._settle(name)
            pending = self._pending[name] = _Pending(mask)
        pending.weight += weight
        pending.workers += 1

    def _settle(self, *names: str) -> None:
        for name in names or list(self._pending):
            if (pending := self._pending.pop(name, None)) is not None:
                self._count(name, pending.mask, pending.weight, pending.workers)

    def _count(self, name: str, mask: Mask, weight: int, workers: int = 1) -> None:
        if mask.whole:
            self._weight[name] += weight
            self._workers[name] += workers
            return
        if name not in self._trainers:
            self._trainers[name] = torch.zeros(self._theta[name].shape, dtype=self._counts)
        if weight != workers and name not in self._weights:  # so far every weight was 1
            self._weights[name] = self._trainers[name].to(torch.int64)
        mask.add_to(self._trainers[name], workers)
        if name in self._weights:
            mask.add_to(self._weights[name], weight)

    def weights(self, name: str) -> tuple[int, Tensor | None]:
        """Return the sum of the trainers' weights at each coordinate of a tensor, in two parts.

        Returns
        -------
        everywhere, more
            What counts at every coordinate; what each coordinate has beside it, shaped like the
            tensor, or None where that is nothing.
        """
        self._settle(name)
        return self._weight[name], self._weights.get(name, self._trainers.get(name))

    def counts(self) -> dict[str, Tensor]:
        """Return |N_r^i| for every coordinate i: int32, of theta's shapes; do not write to it."""
        self._settle()
        return {name: self._of(name) for name in self._theta}

    def _of(self, name: str) -> Tensor:
        if name in self._trainers:
            return self._trainers[name].to(torch.int32) + self._workers[name]
        everywhere = torch.tensor(self._workers[name], dtype=torch.int32)
        return everywhere.expand(self._theta[name].shape)

    def gamma(self) -> int:
        """Return Gamma_r = min_i |N_r^i|."""
        self._settle()
        return min(
            self._workers[name] + (int(self._trainers[name].min()) if name in self._trainers else 0)
            for name in self._theta
        )

    def trainers(self) -> dict[int, int]:
        """Return how many coordinates have so many trainers: {|N_r^i|: coordinates}, in order.

        The least key is Gamma_r. The key 0 counts the coordinates that nobody trained; counts of
        zero are left out.
        """
        self._settle()
        found: Counter[int] = Counter()
        for name, value in self._theta.items():
            if name in self._trainers:
                for count, coordinates in enumerate(torch.bincount(self._trainers[name].view(-1))):
                    found[self._workers[name] + count] += int(coordinates)
            else:
                found[self._workers[name]] += value.numel()
        return {count: found[count] for count in sorted(found) if found[count]}

    def trained(self) -> float:
        """Return the fraction of coordinates with at least one trainer."""
        counts = self.trainers()
        return 1 - counts.get(0, 0) / sum(counts.values())
