"""What passes between server and workers, and what is written down of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fed_diffusion.protocol.divergence import FIRST_LOSS
from fed_diffusion.protocol.errors import DivergedError, UpdateError
from fed_diffusion.protocol.wire import Payload

MEASURED_LIMIT = 2.0**53
"""A number above any loss, time or count that a worker can have measured."""
EXAMPLES_LIMIT = 2**24
"""The most images of one client by which it can be weighted: the exact sums allow for this."""
MOST_EXAMPLES = 2**32
"""A number above any number of images that a client can have trained on."""
PRECISION, PRECISIONS = "precision", ("fp32", "tf32", "bf16")
"""What a worker's network computed in; it travels as its place in this list."""


@dataclass(frozen=True)
class Task:
    """One client's work in one round, as it travels."""

    round: int
    client: int
    payload: Payload


@dataclass(frozen=True)
class Update:
    """What one client sends back: kept values; the recipe and its measurements as numbers."""

    round: int
    client: int
    payload: Payload


def measurements(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the worker's measurements, checked, since they end in the record of the run."""
    try:
        measured: dict[str, Any] = {
            "loss": float(numbers["loss"]),
            "images": int(numbers["images"]),
            "examples": int(numbers["examples"]),
            "seconds": float(numbers["seconds"]),
        }
        if "holdout_loss" in numbers:
            measured["holdout_loss"] = float(numbers["holdout_loss"])
        if PRECISION in numbers:
            measured["precision"] = dict(enumerate(PRECISIONS))[int(numbers[PRECISION])]
        first = float(numbers.get(FIRST_LOSS, math.nan))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UpdateError(f"measurement missing or not a number: {error}") from error
    losses = {key: measured[key] for key in ("loss", "holdout_loss") if key in measured}
    if FIRST_LOSS in numbers:
        raise DivergedError(
            f"its training diverged: the loss was {first:.4g} in its first step and "
            f"{measured['loss']:.4g} over all",
            first,
        )
    if odd := {key: value for key, value in losses.items() if not value <= MEASURED_LIMIT}:
        raise DivergedError(f"its losses are not finite or out of range: {odd}")
    # NaN fails every comparison; a limit on each keeps one client from owning the sums
    counted = [value for value in measured.values() if not isinstance(value, str)]
    legal = all(0 <= value <= MEASURED_LIMIT for value in counted)
    if not legal or not 1 <= measured["examples"] <= MOST_EXAMPLES:
        raise UpdateError(f"measurements are not finite or out of range: {measured}")
    return measured
