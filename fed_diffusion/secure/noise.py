"""Differential privacy without trust in the server: each client adds its share of the noise.

A client clips its difference to C by itself, and adds to each of its whole numbers an independent
discrete Gaussian N_Z(0, s^2), in units of the sums' last bit, with s^2 = (z C)^2 / `secure.least`.
A coordinate is opened only if at least `secure.least` of the clients that are left keep it, whoever
was lost, so that the noise on every opened sum has a variance of at least (z C)^2. That a sum of n
discrete Gaussians is nearly one of n times the variance is Proposition 14 of Kairouz, Liu and
Steinke (The Distributed Discrete Gaussian Mechanism, ICML 2021, arXiv 2102.06387): with D
coordinates the sum is eps^2 / 2 concentrated differentially private, for

    eps = C / (sqrt(n) s) + tau sqrt(D),  tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1)).

In the sums' unit s is at least 2^10, which the configuration is checked for, so that tau is below
10 n exp(-10^6): no float64 tells eps from 1 / z, the Gaussian mechanism's, and the accountant is
the same. What is drawn is not quite that law: what its tail lacks is in the delta that a run states
(`aggregation.private.spent`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.exact import SCALE
from fed_diffusion.config.schema import PrivacyConfig
from fed_diffusion.masks.mask import Masks, mask_of
from fed_diffusion.protocol.clipping import factor_of
from fed_diffusion.protocol.codecs import difference
from fed_diffusion.secure.keys import WORDS, Stream, fresh

CELLS, CELL_BITS = 1 << 13, 51
"""The alias table has 2^13 cells of 2^51 each: one random word chooses among them."""
NARROW = 256
"""Beyond twice this standard deviation the table is of blocks of numbers."""


class DiscreteGaussian:
    """Draws from N_Z(0, s^2): P(k) is proportional to exp(-k^2 / (2 s^2)), k a whole number.

    The magnitude k = q B + r has its block q from an alias table of whole weights, proportional to
    the largest probability in the block, and r, uniform in the block, by random bits. It is
    accepted with probability exp(-(k^2 - (q B)^2) / (2 s^2)), which is 0.997 on average. So low
    bits come from random bits and no number is a rounded real one, whatever s is. A difference of
    Poissons (Skellam) would need means of 10^20 in the sums' unit, beyond numpy's. Random bits are
    a ChaCha20 stream whose key is the operating system's.

    Weights are rounded to 2^-64, which leaves out what is beyond 8.8 s, and probabilities of
    acceptance to 2^-53. Over the weights below 2^-40, of which rounding may change a large part,
    the distance to the exact law is below `aggregation.private.SAMPLER` in total variation.
    Elsewhere the chi-squared distance is below 1e-25: over 10^13 draws the logarithm of a
    likelihood ratio changes by some 1e-6.

    Parameters
    ----------
    s
        From 0.3 to 2^58.
    """

    def __init__(self, s: float):
        self._width = max(0, math.floor(math.log2(s / NARROW)))
        """The binary logarithm of B."""
        self._thresholds, self._aliases = _alias_table(s / 2.0**self._width)
        self._half = 0.5 / s**2
        self._stream = Stream(fresh())

    def draw(self, count: int) -> np.ndarray:
        """Return so many independent numbers, int64."""
        found, filled = np.empty(count, np.int64), 0
        while filled < count:
            some = self._some()[: count - filled]
            found[filled : filled + len(some)] = some
            filled += len(some)
        return found

    def _some(self) -> np.ndarray:
        """Return those of `WORDS` proposals that are accepted."""
        words = self._stream.words(WORDS)
        cells = (words >> np.uint64(CELL_BITS)).astype(np.intp)
        stays = (words & np.uint64((1 << CELL_BITS) - 1)) < self._thresholds[cells]
        first = np.where(stays, cells, self._aliases[cells]) << self._width
        words = self._stream.words(WORDS)
        signs = 1 - 2 * (words >> np.uint64(63)).astype(np.int64)
        rest = (words & np.uint64((1 << self._width) - 1)).astype(np.int64)
        numbers = first + rest
        accepted = (numbers > 0) | (signs > 0)  # of two zeros one
        if self._width:
            excess = rest * (2.0 * first + rest) * self._half
            accepted &= (self._stream.words(WORDS) >> np.uint64(11)) * 2.0**-53 < np.exp(-excess)
        return (signs * numbers)[accepted]


@cache
def _alias_table(s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return thresholds and aliases for weights exp(-q^2 / (2 s^2)), which sum to 2^64 exactly."""
    exact = [math.exp(-0.5 * (q / s) ** 2) for q in range(CELLS)]
    total = math.fsum(exact)
    weights = [round(one / total * 2.0**64) for one in exact]
    weights[0] += (CELLS << CELL_BITS) - sum(weights)
    full = 1 << CELL_BITS
    thresholds, aliases = [full] * CELLS, list(range(CELLS))
    small = [q for q in range(CELLS) if weights[q] < full]
    large = [q for q in range(CELLS) if weights[q] >= full]
    while small:  # Vose's method: whoever has too little gets the rest of its cell from another one
        poor, rich = small.pop(), large[-1]
        thresholds[poor], aliases[poor] = weights[poor], rich
        weights[rich] -= full - weights[poor]
        if weights[rich] < full:
            small.append(large.pop())
    return np.array(thresholds, np.uint64), np.array(aliases, np.intp)


@dataclass(frozen=True)
class Share:
    """One client's part in the privacy of a sum.

    Attributes
    ----------
    clip
        C, the largest Euclidean norm of the client's difference.
    sigma
        The standard deviation of the client's own noise.
    """

    clip: float
    sigma: float

    @classmethod
    def of(cls, privacy: PrivacyConfig, least: int) -> Share | None:
        """Return a client's share where clients add the noise, for sums of at least so many."""
        if privacy.clip is None or privacy.noise != "clients":
            return None
        return cls(privacy.clip, privacy.noise_multiplier * privacy.clip / math.sqrt(least))

    def clipped(
        self,
        values: Mapping[str, Tensor],
        theta: Mapping[str, Tensor],
        masks: Masks,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return kept values less theta, no longer than C after they are rounded to whole numbers.

        A difference that is not finite becomes zero. It must not keep its client from the sum: who
        is lost shows in theta, and must not depend on the images.

        Parameters
        ----------
        values
            What the masks keep.
        theta
            theta_r, shaped like the whole network.
        scale
            That of `Room`, by which whole numbers are multiplied beside 2^40.
        """
        square, count = difference(values, theta, masks)
        if not math.isfinite(square):
            return {name: torch.zeros_like(value) for name, value in values.items()}
        rounded = math.sqrt(count) / (SCALE * scale)  # twice of what rounding adds at most
        longest = max(0.0, self.clip - rounded)
        factor = factor_of(math.sqrt(square), longest)
        kept = {name: mask_of(masks, name, theta[name]).take(theta[name]) for name in values}
        return {name: (value - kept[name]) * factor for name, value in values.items()}

    def add_to(self, words: Iterable[np.ndarray], scale: float) -> None:
        """Add the client's noise to its whole numbers, modulo 2^64, in place; see `clipped`."""
        source = DiscreteGaussian(self.sigma * SCALE * scale)
        for numbers in words:
            numbers += source.draw(len(numbers))
