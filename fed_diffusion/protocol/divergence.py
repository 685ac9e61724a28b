"""How a worker says that its training has diverged."""

from __future__ import annotations

import math

FACTOR = 1000.0
"""A loss so many times an earlier one means that training has diverged."""
LEAST = 0.1
"""Earlier losses below this count as this: a network whose output is zero has a loss of about 1."""
FIRST_LOSS = "diverged.first_loss"
"""The name under which a worker whose training diverged sends the loss of its first step."""


def exploded(loss: float, before: float) -> bool:
    """Return whether a loss is not finite, or beyond what honest training makes of `before`."""
    return not (math.isfinite(loss) and loss <= FACTOR * max(before, LEAST))
