"""What results.json says of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fed_diffusion.aggregation.private import spent
from fed_diffusion.analysis.measured import measured
from fed_diffusion.build import Setup
from fed_diffusion.config import method_name
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.start import facts_of


def results_of(
    setup: Setup,
    history: Sequence[RoundSummary],
    theta: Mapping[str, Tensor],
    *,
    seconds: Mapping[str, float],
    quality: Mapping[str, Any],
    opened: int,
    data: Mapping[str, Any] | None = None,
    changes: Any = None,
) -> dict[str, Any]:
    """Return the figures of a run, computed from its settings and rounds alone.

    Parameters
    ----------
    theta
        The parameters after the last round.
    seconds
        What the time was spent on.
    quality
        The figures of generated images.
    opened
        Under privacy, how many rounds were sent to clients, repeated ones each time.
    data
        What is to be said of the images.
    changes
        The settings that differ from those that the run began with, if it was resumed so.
    """
    config, last = setup.config, history[-1]
    results = {
        "preset": config.preset,
        "method": config.method or method_name(config),
        "clients": config.clients,
        "rounds": last.round,
        "seed": config.seed,
        "parameters": sum(value.numel() for value in theta.values()),
        "loss": last.loss,
        "holdout_loss": last.holdout_loss,
        "dsm_objective": last.dsm_objective,
        "gamma_star": min(s.gamma for s in history),
        "w2_max": max(s.w2_max for s in history),
        "undefended": max((n for s in history if (n := s.undefended) is not None), default=None),
        "bytes_up": sum(s.bytes_up for s in history),
        "bytes_down": sum(s.bytes_down for s in history),
        "seconds": {what: round(spent_on, 3) for what, spent_on in seconds.items()},
        "rejected": sum(len(s.rejected) for s in history),
        "theory": measured(setup, history, theta),
        "quality": quality,
    }
    if data is not None:
        results["data"] = data
    if (start := facts_of(config.model)) is not None:
        results["start"] = start
    drawn = config.clients * sum(value.numel() for value in theta.values())
    privacy = spent(config.privacy, config.round.fraction, opened, last.round, drawn)
    if privacy is not None:
        results["privacy"] = privacy
    recorded = {s.round for s in history}
    if lost := sorted(set(range(1, last.round + 1)) - recorded):
        results["rounds_not_recorded"] = lost
    if changes:
        results["changes"] = changes
    return results
