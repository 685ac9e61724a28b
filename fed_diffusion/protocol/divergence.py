"""How a worker says that its training has diverged."""

from __future__ import annotations

import math

from fed_diffusion.masks.recipe import Numbers

FACTOR = 1000.0
"""A loss so many times an earlier one means that training has diverged."""
LEAST = 0.1
"""Earlier losses below this count as this: a network whose output is zero has a loss of about 1."""
FIRST_LOSS = "diverged.first_loss"
"""The name under which a worker whose training diverged sends the loss of its first step."""


def exploded(loss: float, before: float) -> bool:
    """Return whether a loss is not finite, or beyond what honest training makes of `before`."""
    return not (math.isfinite(loss) and loss <= FACTOR * max(before, LEAST))


def note_divergence(numbers: Numbers, first: float, among: int | None) -> None:
    """Say among a worker's numbers that its training diverged, if it has; or hide it.

    Where clients add the noise, an update that is lost takes its noise along, and that shows. So
    losses with which it would not count are replaced by one with which it does.

    Parameters
    ----------
    first
        The loss of the first step.
    among
        Among how many clients it is hidden, since the losses of all must fit into a sum; None
        where it is said.
    """
    if among is None:
        if exploded(float(numbers["loss"]), first):  # type: ignore[arg-type]
            numbers[FIRST_LOSS] = first
        return
    most = min(FACTOR, 2.0**20 / among)
    for key in ("loss", "holdout_loss"):
        if key in numbers and not 0 <= float(numbers[key]) <= most:  # type: ignore[arg-type]
            numbers[key] = most
