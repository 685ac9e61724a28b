"""What passes between server and workers, and what is written down of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from fed_diffusion.federation.aggregate import DivergedError, UpdateError
from fed_diffusion.federation.divergence import FIRST_LOSS
from fed_diffusion.federation.wire import Payload

MEASURED_LIMIT = 2.0**53
"""Above any loss, time or count that a worker can have measured."""
EXAMPLES_LIMIT = 2**24
"""The most images of one client by which it can be weighted: the exact sums allow for it."""
MOST_EXAMPLES = 2**32
"""Above any number of images that a client can have trained on."""
PRECISION, PRECISIONS = "precision", ("fp32", "tf32", "bf16")
"""What a worker's network computed in travels as its place in this list."""


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


@dataclass(frozen=True)
class ClientRound:
    """One client's line in a round's record."""

    client: int
    kind: str
    keep: float
    loss: float
    holdout_loss: float | None
    w2: float
    images: int
    seconds: float
    bytes_up: int
    bytes_down: int
    precision: str = "unknown"
    """What its network computed in, as the worker reports it."""


@dataclass
class RoundSummary:
    """What is known of a finished round; a line of metrics.jsonl."""

    round: int
    loss: float
    holdout_loss: float | None
    dsm_objective: float
    gamma: int
    trained: float
    w2_max: float
    w2_n_over_gamma: float | None
    """w^2 N / Gamma_r, as it stands in the bound; None where Gamma_r is 0."""
    bytes_up: int
    bytes_down: int
    dense_bytes: int
    images: int
    eta: float
    clients: list[ClientRound]
    rejected: list[dict[str, Any]]
    """client, reason and, where known, the node, of every update that did not count."""
    staleness: int = 0
    """Buffered: how often theta changed, at most, while a worker of this update trained."""
    clock: float | None = None
    """Simulated seconds since the start, where round.pace is set."""
    late: int = 0
    """Replies that came after their round was closed, and were thrown away."""
    banned: list[int] = field(default_factory=list)
    """Clients that are left out for having sent bad updates repeatedly."""
    absent: list[int] = field(default_factory=list)
    """Clients whose nodes were not there when the round began."""
    outliers: list[int] = field(default_factory=list)
    """Clients whose loss or held-out loss is left out of the round's (`divergence.usual_mean`)."""
    coverage: dict[str, int] = field(default_factory=dict)
    """|N_r^i| -> how many coordinates have so many trainers."""
    theory: dict[str, Any] | None = None
    """What a diagnostic round measured, on the scale of the simple loss (`diagnostics.close`)."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> RoundSummary:
        """The inverse of `to_dict`, for a line of metrics.jsonl; `ValueError` where it is none."""
        return _SUMMARY.validate_python(line)


_SUMMARY = TypeAdapter(RoundSummary)


def measurements(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's measurements, checked: they end in the record of the run."""
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
            f"{measured['loss']:.4g} over all"
        )
    if odd := {key: value for key, value in losses.items() if not value <= MEASURED_LIMIT}:
        raise DivergedError(f"its losses are not finite or out of range: {odd}")
    # NaN fails every comparison; a limit on each keeps one client from owning the sums
    counted = [value for value in measured.values() if not isinstance(value, str)]
    legal = all(0 <= value <= MEASURED_LIMIT for value in counted)
    if not legal or not 1 <= measured["examples"] <= MOST_EXAMPLES:
        raise UpdateError(f"measurements are not finite or out of range: {measured}")
    return measured
