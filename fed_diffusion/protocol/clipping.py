"""A client's difference, no longer than privacy.clip."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROOM = 1 - 1e-6
"""Of the clip: what rounding to fixed point and to float32 may add stays below it."""


def clipped(
    end: Mapping[str, Tensor], start: Mapping[str, Tensor], clip: float
) -> dict[str, Tensor]:
    """A client's parameters, no further than `clip` from where they started (Euclidean, fp32).

    A difference of zero stays; one that is not finite becomes zero: it would not count anyway, and
    what a server may see of it is nothing.
    """
    changes = {n: v.detach().to("cpu", torch.float32) - start[n] for n, v in end.items()}
    norms = [float(torch.linalg.vector_norm(c, dtype=torch.float64)) for c in changes.values()]
    norm = math.hypot(*norms)
    if not math.isfinite(norm):
        return {name: value.clone() for name, value in start.items()}
    factor = factor_of(norm, clip)
    return {name: start[name] + change * factor for name, change in changes.items()}


def factor_of(norm: float, clip: float) -> float:
    """What a difference of this norm is multiplied by, so that it is no longer than the clip."""
    return 1.0 if norm <= clip * ROOM else clip * ROOM / norm
