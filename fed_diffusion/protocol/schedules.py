"""Step sizes that both halves of a round compute alike."""

from __future__ import annotations

import math

from fed_diffusion.config.schema import LocalConfig


def eta_of(local: LocalConfig, rounds: int, round: int) -> float:
    """The step size of a round (1-based) of `rounds`: linear warm-up, then constant or cosine."""
    eta = local.eta * min(1.0, round / (local.warmup + 1))
    if local.schedule == "cosine":
        eta *= 0.5 * (1 + math.cos(math.pi * (round - 1) / rounds))
    return eta
