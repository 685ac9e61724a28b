"""A sampler of the user's own: Heun's method on the probability-flow ODE, two evaluations a step.

    fed-diffusion run digits --set evaluation.sampler=examples.own_sampler:heun \
        --set evaluation.steps=50

The contract is `fed_diffusion.Solver`. Times are counted to the data, u_0 = T > ... > u_K = delta,
and the ODE is dY / d(-u) = Y + s(Y, u), so that a step of length g goes from u to u - g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fed_diffusion.diffusion.process import Score
from fed_diffusion.diffusion.samplers import Callback


def heun(
    score: Score,
    y: Tensor,
    u: Tensor,
    *,
    generator: torch.Generator | None = None,
    denoise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Take a step along the slope at its start, then again along the mean of both ends' slopes."""

    def slope(y: Tensor, time: Tensor) -> Tensor:
        return y + score(y, time.expand(len(y)).to(y.device))

    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        first = slope(y, u[k])
        y = y + g / 2 * (first + slope(y + g * first, u[k + 1]))
        if callback is not None:
            callback(k, y)
    if not denoise:
        return y
    end = u[-1]  # Tweedie's mean of the image: (Y + sigma^2 s) / alpha
    return ((y - torch.expm1(-2 * end) * (slope(y, end) - y)) * torch.exp(end)).to(y.dtype)
