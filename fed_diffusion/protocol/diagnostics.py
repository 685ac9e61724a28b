"""Diagnostic rounds: when they are due, and the names under which their numbers travel."""

from __future__ import annotations

from fed_diffusion.config import Config

ASKED, CURVED = "diagnostic.minibatches", "diagnostic.products"
TOGETHER = "diagnostic.workers"
GRADIENTS, FAILED = "diagnostic.gradients", "diagnostic.failed"
LOSS, LOSS_ERROR, M2 = "diagnostic.loss", "diagnostic.loss_error", "diagnostic.M2"
L, L_ERROR = "diagnostic.L", "diagnostic.L_error"


def is_due(config: Config, round: int) -> bool:
    """Return whether a round (1-based) is a diagnostic one.

    It never is under privacy, where a gradient would leave its client unclipped, and never in
    buffered rounds, whose workers train on different theta.
    """
    every = config.theory.every
    if every == 0 or config.privacy.clip is not None or config.round.mode != "synchronous":
        return False
    return round in (1, config.rounds) or (every is not None and round % every == 0)
