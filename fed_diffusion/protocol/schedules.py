"""Step sizes that both halves of a round compute alike."""

from __future__ import annotations

import math

from fed_diffusion.config import Config


def eta_of(config: Config, round: int) -> float:
    """Return the step size of a round (1-based): linear warm-up, then constant or cosine to 0."""
    local = config.local
    eta = local.eta * min(1.0, round / (local.warmup + 1))
    if local.schedule == "cosine":
        eta *= 0.5 * (1 + math.cos(math.pi * (round - 1) / config.rounds))
    return eta
