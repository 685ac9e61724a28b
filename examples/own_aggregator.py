"""An aggregator of the user's own: a mean of updates, each of which moves a weight by little.

    fed-diffusion run digits --set round.aggregation=examples.own_aggregator:Cautious \
        --set local.state=fresh

The contract is `fed_diffusion.Aggregator`: made with theta_r, the number of updates that there may
be, and the section `round` of the configuration; given every update with its masks; asked for
theta_{r+1}. Whole numbers are summed, so that the order of arrival changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion import Coverage, Masks
from fed_diffusion.aggregation.update import check_update, kept_part
from fed_diffusion.config.schema import RoundConfig
from fed_diffusion.protocol.errors import UpdateError


class Cautious:
    """The result is theta plus the mean of the differences, each cut to at most `MOST`."""

    MOST, STEPS = 1e-3, 2**20

    def __init__(self, theta: Mapping[str, Tensor], workers: int, settings: RoundConfig):
        if settings.weighting != "uniform":
            raise ValueError("every update counts alike; set round.weighting to uniform")
        self.theta = theta
        self.coverage = Coverage(theta, workers)
        self.sums = {n: torch.zeros(v.shape, dtype=torch.int64) for n, v in theta.items()}

    def add(
        self, values: Mapping[str, Tensor], masks: Masks | None = None, weight: float = 1.0
    ) -> None:
        found = check_update(self.theta, values, masks or {})
        kept = {name: kept_part(value, found[name]) for name, value in values.items()}
        if not all(bool(value.isfinite().all()) for value in kept.values()):
            raise UpdateError("its values are not finite")
        for name, mask in found.items():
            cut = (kept[name] - mask.take(self.theta[name])).clamp(-self.MOST, self.MOST)
            mask.add((cut * (self.STEPS / self.MOST)).round().long(), self.sums[name])
        self.coverage.add(masks or {})

    def result(self) -> dict[str, Tensor]:
        step, counts = self.MOST / self.STEPS, self.coverage.counts()
        mean = {n: step * total / counts[n].clamp(min=1) for n, total in self.sums.items()}
        return {name: value + mean[name] for name, value in self.theta.items()}
