"""A client's difference, no longer than privacy.clip."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROOM = 1 - 1e-6
"""The part of the clip that is used: rounding to fixed point and float32 then stays below it."""


def clipped(
    end: Mapping[str, Tensor], start: Mapping[str, Tensor], clip: float
) -> dict[str, Tensor]:
    """Return a client's parameters, at most `clip` from where they started (Euclidean, fp32).

    A difference of zero stays zero. A difference that is not finite becomes zero: it would not
    count anyway, and the server must see nothing of it.
    """
    changes = {n: v.detach().to("cpu", torch.float32) - start[n] for n, v in end.items()}
    norms = [float(torch.linalg.vector_norm(c, dtype=torch.float64)) for c in changes.values()]
    norm = math.hypot(*norms)
    if not math.isfinite(norm):
        return {name: value.clone() for name, value in start.items()}
    factor = factor_of(norm, clip)
    return {name: start[name] + change * factor for name, change in changes.items()}


def factor_of(norm: float, clip: float) -> float:
    """Return the factor that makes a difference of this norm no longer than the clip."""
    return 1.0 if norm <= clip * ROOM else clip * ROOM / norm
