"""What is written down about a round: the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter


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
    weight: int = 1
    """How often the update counted (round.weighting)."""
    precision: str = "unknown"
    """What the client's network computed in, as the worker reports it."""
    node: str | None = None
    """The Flower node that sent the update; None in one process."""


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
    """The updates that did not count.

    Each has client, reason, fault (`protocol.errors.Fault`) and, where known, the node.
    """
    staleness: int = 0
    """In buffered rounds: how often theta changed, at most, while a worker of this update
    trained.
    """
    clock: float | None = None
    """The simulated seconds since the start, where round.pace is set."""
    late: int = 0
    """The number of replies that came after their round was closed, and were thrown away."""
    banned: list[int] = field(default_factory=list)
    """The clients that are left out because they sent bad updates repeatedly."""
    absent: list[int] = field(default_factory=list)
    """The clients whose nodes were not there when the round began."""
    refused: list[dict[str, str]] = field(default_factory=list)
    """The node and the reason for every node at the end of the round that cannot be used."""
    outliers: list[int] = field(default_factory=list)
    """The clients whose losses are left out of the round's mean (`divergence.usual_mean`)."""
    coverage: dict[str, int] = field(default_factory=dict)
    """|N_r^i| -> how many coordinates have so many trainers."""
    withheld: int | None = None
    """Coordinates that were trained and keep theta_r, since fewer than secure.least updates may be
    behind them; they count as trained by nobody. None without secure aggregation."""
    undefended: int | None = None
    """The number of coordinates with one or two trainers, on each of which one liar decides.

    It is None where round.aggregation does not withstand liars elsewhere.
    """
    theory: dict[str, Any] | None = None
    """What a diagnostic round measured, on the scale of the simple loss (`diagnostics.close`)."""
    adapter_gap: dict[str, float] | None = None
    """How far the product of the mean factors of an adapter is from the mean of the clients'
    products, where both factors are trained (`server.gap`).
    """
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> RoundSummary:
        """Undo `to_dict`, for a line of metrics.jsonl; raise `ValueError` for another line."""
        return _SUMMARY.validate_python(line)


_SUMMARY = TypeAdapter(RoundSummary)
