"""How a worker says that its training has diverged."""

from __future__ import annotations

import math

FACTOR = 1000.0
"""A loss so many times an earlier one means that training has diverged."""
LEAST = 0.1
"""Earlier losses below it count as it: a network whose output is zero has a loss of about 1."""
FIRST_LOSS = "diverged.first_loss"
"""Sent along by a worker whose training diverged: the loss of its first step."""


def exploded(loss: float, before: float) -> bool:
    """Whether a loss is not finite, or beyond all that honest training makes of `before`."""
    return not (math.isfinite(loss) and loss <= FACTOR * max(before, LEAST))
