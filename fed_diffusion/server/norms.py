"""How far an update may be from the theta that it began on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.config.schema import PrivacyConfig, RoundConfig
from fed_diffusion.masks.mask import Masks
from fed_diffusion.protocol.codecs import difference
from fed_diffusion.protocol.errors import DivergedError, UpdateError

AUTO = 100.0
"""The factor for round.norm_factor = auto.

It is far beyond what clients of unequal data and steps differ by, and one update of that size does
not make theta useless.
"""
LEAST = 1e-2
"""The part of theta's root mean square to start from, while no update is known.

Networks may begin at zero.
"""
HARMLESS = 1e-2
"""A difference below this part of theta's root mean square is not refused for its size."""
KEPT = 256
"""The number of earlier updates whose size the relative limit compares with."""


class NormLimit:
    """The limits round.max_norm and round.norm_factor on updates.

    Parameters
    ----------
    most, factor
        The two settings; None: no limit.

    Attributes
    ----------
    recent
        Root-mean-square differences of earlier rounds' updates. Only closed rounds count, so that
        a verdict does not depend on who came first.
    """

    def __init__(self, most: float | None, factor: float | None):
        self._most = most
        self._factor = factor
        self.recent: list[float] = []
        self._own: float | None = None
        """The root mean square of theta; None until it is asked for in a round."""

    def check(
        self, values: Mapping[str, Tensor], theta: Mapping[str, Tensor], masks: Masks
    ) -> float | None:
        """Return the root mean square of an update's difference to theta; None without a limit.

        Raises
        ------
        UpdateError, DivergedError
            The difference's norm is beyond `most`, or its root mean square (by which small and
            large networks compare) is beyond `factor` times the median of recent ones. In the first
            round, which has no recent ones, theta's root mean square takes the median's place: no
            honest step is many times theta.
        """
        if self._most is None and self._factor is None:
            return None
        square, count = difference(values, theta, masks)
        norm, rms = math.sqrt(square), math.sqrt(square / max(count, 1))
        if not math.isfinite(norm):
            return None  # refused for that, in other words
        if self._most is not None and not norm <= self._most:
            raise UpdateError(f"its difference has norm {norm:.4g}, above {self._most:g}")
        if self._factor is not None:
            own = self._own = _root_mean_square(theta) if self._own is None else self._own
            usual, of = max(own, LEAST), "theta's own"
            if self.recent:
                usual, of = statistics.median(self.recent), "the median of recent updates"
            if not (rms <= self._factor * usual or rms <= HARMLESS * own):
                raise DivergedError(
                    f"its difference is {rms:.4g} (root mean square), above {self._factor:g} "
                    f"times {of}"
                )
        return rms

    def learn(self, fresh: list[float]) -> None:
        """Note a closed round's updates, in an order that does not depend on arrival."""
        self.recent = (self.recent + sorted(fresh))[-KEPT:]
        self._own = None


def limit_of(settings: RoundConfig, privacy: PrivacyConfig) -> NormLimit:
    """The limits of a run.

    Under privacy `auto` is no factor: what others sent must not decide whether an update counts.
    """
    factor = settings.norm_factor
    if factor == "auto":
        factor = AUTO if privacy.clip is None else None
    return NormLimit(settings.max_norm, factor)


def _root_mean_square(theta: Mapping[str, Tensor]) -> float:
    norms = [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in theta.values()]
    return math.hypot(*norms) / math.sqrt(sum(value.numel() for value in theta.values()))
