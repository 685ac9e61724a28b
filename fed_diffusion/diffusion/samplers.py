"""Samplers: pure functions from a score, a start and a partition to samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fed_diffusion.diffusion.process import Score

Callback = Callable[[int, Tensor], None]


def exponential_integrator(
    score: Score,
    y: Tensor,
    u: Tensor,
    *,
    generator: torch.Generator | None = None,
    denoise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Solve the reverse process (10) exactly on each step, the score held fixed (Appendix B).

    Y <- e^g Y + 2 (e^g - 1) s(Y, u_k) + sqrt(e^{2g} - 1) eps, with g = gamma_k, from u_0 = T down
    to u_K = delta. Coefficients in float64; the state keeps y's dtype.

    Parameters
    ----------
    score
        s(y, u): y [n, ...], u [n] float64 -> [n, ...].
    y
        The start, Y ~ N(0, I) [n, ...]; not changed.
    u
        The partition, float64 [K + 1].
    generator
        Source of the noise, on y's device.
    denoise
        End with the Tweedie mean (Y + sigma_delta^2 s(Y, delta)) / e^{-delta}: K + 1 evaluations.
        The theory covers the output without it.
    callback
        Called as callback(k, Y) after every step.
    """
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        drift = score(y, u[k].expand(len(y)).to(y.device))
        y = math.exp(g) * y + 2 * math.expm1(g) * drift + math.sqrt(math.expm1(2 * g)) * noise
        if callback is not None:
            callback(k, y)
    if denoise:
        delta = float(u[-1])
        drift = score(y, u[-1].expand(len(y)).to(y.device))
        y = (y - math.expm1(-2 * delta) * drift) * math.exp(delta)
    return y
