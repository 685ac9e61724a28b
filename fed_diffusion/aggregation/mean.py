"""Equation (8): each coordinate is averaged over the workers that trained it.

(8) is a ratio of two additive sums, sum(m theta) and sum(m), and with weights, such as numbers of
examples, of sum(m w theta) and sum(m w). Both are whole numbers (`exact`, `coverage`), so that the
result has the same bits in any order and grouping of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.exact import BLOCK, SCALE, ExactSums
from fed_diffusion.aggregation.update import Room, check_update
from fed_diffusion.masks.mask import Masks


class MaskedMean:
    """The coordinate-wise mean (8), streamed in O(D) memory whatever the number of workers.

    Parameters
    ----------
    theta
        The current parameters by name (float32); coordinates that nobody trained keep them.
    workers, heaviest
        The most updates that will be added, and the largest weight of one; see `Room`.

    Examples
    --------
    >>> from fed_diffusion.masks.mask import Scattered
    >>> mean = MaskedMean({"w": torch.zeros(2)})
    >>> first = {"w": Scattered(torch.tensor([True, False]))}
    >>> mean.add({"w": torch.tensor([1.0])}, first)
    >>> mean.add({"w": torch.tensor([3.0])}, first)
    >>> mean.result()
    {'w': tensor([2., 0.])}
    """

    def __init__(self, theta: Mapping[str, Tensor], workers: int = 1024, heaviest: int = 1):
        self._theta = dict(theta)
        self._room = Room(workers, heaviest)
        self._sums = ExactSums(self._theta, self._room)
        self.coverage = Coverage(self._theta, workers)

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        """Add one worker's theta_{r,n,S} under its masks.

        Parameters
        ----------
        values
            Float tensors by theta's names, on any device: what the masks keep of each. Under a mask
            of single weights they may be shaped like theta; what it drops is not read.
        masks
            The masks by tensor name; a tensor that is not named is kept whole.
        weight
            A positive whole number (equation (8) has 1).

        Raises
        ------
        UpdateError
            The names, the shapes or the dtype are wrong, or a value is not finite, or a value times
            the weight is beyond the update's share of the sums' range. Nothing has been added then.
        """
        values = {name: value.detach().cpu() for name, value in values.items()}
        masks = masks or {}
        whole = self._room.check(weight)
        self._sums.add(values, check_update(self._theta, values, masks), whole)
        self.coverage.add(masks, whole)

    def fill(self, name: str, sums: Tensor, level: int = 0) -> None:
        """Take a tensor's sums as secure aggregation has made them; see `ExactSums.fill`.

        Whose they are is added to `coverage` by itself. There is one part of every value: level 0.
        """
        assert level == 0
        self._sums.fill(name, sums)

    def result(self) -> dict[str, Tensor]:
        """Return theta_{r+1}: the mean where somebody trained, theta_r elsewhere; float32."""
        return {name: self._mean(name) for name in self._theta}

    def _mean(self, name: str) -> Tensor:
        old = self._theta[name]
        new = torch.empty_like(old).flatten()
        flat = old.flatten()
        everywhere, more = self._counts(name)
        counts = None if more is None else more.flatten()
        for start in range(0, flat.numel(), BLOCK):
            block = slice(start, start + BLOCK)
            total = self._total(name, block)
            if counts is None:
                new[block] = total.div_(everywhere) if everywhere else flat[block]
            else:
                here = counts[block]
                mean = total.div_(here.to(torch.float64).add_(everywhere))
                somebody = everywhere or int(here.min()) > 0
                new[block] = mean if somebody else torch.where(here > 0, mean.float(), flat[block])
        return new.view(old.shape)

    def _counts(self, name: str) -> tuple[int, Tensor | None]:
        """Return the sum of weights; see `Coverage.weights`."""
        return self.coverage.weights(name)

    def _total(self, name: str, block: slice) -> Tensor:
        """Return the weighted sums of a part of a flattened tensor, float64."""
        total = self._sums[name].view(-1)[block].to(torch.float64)
        total *= 1 / (SCALE * self._room.scale)  # exact: a power of two
        return total
