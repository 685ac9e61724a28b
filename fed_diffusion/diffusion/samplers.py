"""Samplers: pure functions from a score, a start and a partition to samples.

`exponential_integrator` is the paper's; `second_order_sde` solves the same process with a better
estimate on each step. The two others follow the probability-flow ODE

    dY / d(-u) = Y + s(Y, u),

whose solutions have the marginals of (1) at every u, without noise: the start decides the image.
With alpha = e^{-u}, sigma^2 = 1 - e^{-2u} and s = -eps / sigma the ODE is exactly

    d(Y / alpha) = eps d(sigma / alpha),        d(Y / sigma) = x0 d(alpha / sigma),

where x0 = (Y + sigma^2 s) / alpha is Tweedie's estimate of the image. On each step the linear part
is solved exactly, so what is left to approximate is eps or x0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fed_diffusion.diffusion.process import Score, sigma

Callback = Callable[[int, Tensor], None]

FEW_STEPS = 15
"""With fewer steps than this, `second_order` ends with a first-order step (Lu et al. 2022, 4)."""


class Solver(Protocol):
    """What evaluation.sampler names: K evaluations of the score for K steps, one more to denoise.

    Parameters
    ----------
    score
        s(y, u): y [n, ...], u [n] float64 -> [n, ...].
    y
        The start, Y ~ N(0, I) [n, ...]; not changed.
    u
        The partition, float64 [K + 1].
    generator
        Source of the noise, on y's device; a deterministic sampler draws none.
    denoise
        End with the Tweedie mean (Y + sigma_delta^2 s(Y, delta)) / e^{-delta}: K + 1 evaluations.
        The theory covers the output without it.
    callback
        A function that is called as callback(k, Y) after every step.

    Returns
    -------
    Tensor
        Samples, in y's shape and dtype: images as the network sees them, in [-1, 1].
    """

    def __call__(
        self,
        score: Score,
        y: Tensor,
        u: Tensor,
        *,
        generator: torch.Generator | None = None,
        denoise: bool = False,
        callback: Callback | None = None,
    ) -> Tensor: ...


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
    to u_K = delta. Coefficients in float64; the state keeps y's dtype. Parameters: see `Solver`.
    """
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        drift = _at(score, y, u[k])
        y = math.exp(g) * y + 2 * math.expm1(g) * drift + math.sqrt(math.expm1(2 * g)) * noise
        if callback is not None:
            callback(k, y)
    return _tweedie(score, y, u[-1]) if denoise else y


def probability_flow(
    score: Score,
    y: Tensor,
    u: Tensor,
    *,
    generator: torch.Generator | None = None,
    denoise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Solve the probability-flow ODE, the noise estimate eps = -sigma s held fixed: DDIM.

    d(Y / alpha) = eps d(sigma / alpha) over one step, with g = gamma_k and sigma_k = sigma(u_k):
    Y <- e^g Y + sigma_k (e^g sigma_k - sigma_{k+1}) s(Y, u_k). Order 1. Deterministic.

    Held fixed is eps, not s: eps stays of size 1 where s grows as 1 / sigma, and the step is exact
    for any g when the data is one point. Holding x0 gives the same formula. Parameters: see
    `Solver`.
    """
    scales = sigma(u).tolist()
    for k in range(len(u) - 1):
        grow = math.exp(float(u[k] - u[k + 1]))
        y = grow * y + scales[k] * (grow * scales[k] - scales[k + 1]) * _at(score, y, u[k])
        if callback is not None:
            callback(k, y)
    return _tweedie(score, y, u[-1]) if denoise else y


def second_order(
    score: Score,
    y: Tensor,
    u: Tensor,
    *,
    generator: torch.Generator | None = None,
    denoise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Solve the probability-flow ODE, x0 linear in log(alpha / sigma): DPM-Solver++(2M).

    With lambda = log(alpha / sigma), h = lambda_{k+1} - lambda_k and r = h_{k-1} / h_k
    (Lu et al. 2022, algorithm 2):
    Y <- (sigma_{k+1} / sigma_k) Y + alpha_{k+1} (1 - e^{-h}) D,
    D = x0_k + (x0_k - x0_{k-1}) / (2 r). Order 2, one evaluation a step. Deterministic.

    The first step has no x0 behind it and takes D = x0_k, as does the last of fewer than
    `FEW_STEPS`, where the extrapolation is at its worst. Parameters: see `Solver`.
    """
    return _multistep(score, y, u, _Noise(0), denoise, callback)


def second_order_sde(
    score: Score,
    y: Tensor,
    u: Tensor,
    *,
    generator: torch.Generator | None = None,
    denoise: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Solve the reverse process (10), x0 linear in log(alpha / sigma): SDE-DPM-Solver++(2M).

    The paper's process with its noise, D and h as in `second_order` (Lu et al. 2022, section 5):
    Y <- (sigma_{k+1} / sigma_k) e^{-h} Y + alpha_{k+1} (1 - e^{-2h}) D
         + sigma_{k+1} sqrt(1 - e^{-2h}) eps.
    When the data is one point each step has the exact law. Parameters: see `Solver`.
    """
    return _multistep(score, y, u, _Noise(1, generator), denoise, callback)


class _Noise(NamedTuple):
    """The amount of noise: 1 is the reverse process, 0 its probability-flow ODE."""

    amount: int
    generator: torch.Generator | None = None


def _multistep(
    score: Score, y: Tensor, u: Tensor, noise: _Noise, denoise: bool, callback: Callback | None
) -> Tensor:
    """Solve by DPM-Solver++(2M), with the noise of the reverse process or without."""
    K = len(u) - 1
    scales, log_ratio = sigma(u).tolist(), (-0.5 * torch.log(torch.expm1(2 * u))).tolist()
    before: Tensor | None = None
    for k in range(K):
        x0 = _tweedie(score, y, u[k])
        h = log_ratio[k + 1] - log_ratio[k]
        ahead = x0
        if before is not None and not (k == K - 1 and K < FEW_STEPS):
            ahead = x0 + (0.5 * h / (log_ratio[k] - log_ratio[k - 1])) * (x0 - before)
        shrink = scales[k + 1] / scales[k] * math.exp(-h * noise.amount)
        gain = math.exp(-float(u[k + 1])) * -math.expm1(-h * (1 + noise.amount))
        y = shrink * y + gain * ahead
        if noise.amount:
            eps = torch.randn(y.shape, generator=noise.generator, device=y.device, dtype=y.dtype)
            y = y + scales[k + 1] * math.sqrt(-math.expm1(-2 * h)) * eps
        before = x0
        if callback is not None:
            callback(k, y)
    return _tweedie(score, y, u[-1]) if denoise else y


SAMPLERS: dict[str, Solver] = {
    "exponential_integrator": exponential_integrator,
    "probability_flow": probability_flow,
    "second_order": second_order,
    "second_order_sde": second_order_sde,
}


def _at(score: Score, y: Tensor, u: Tensor) -> Tensor:
    """Return the score of a whole batch at one time."""
    return score(y, u.expand(len(y)).to(y.device))


def _tweedie(score: Score, y: Tensor, u: Tensor) -> Tensor:
    """Return x0 = (Y + sigma_u^2 s(Y, u)) / e^{-u}, the mean of the image given Y."""
    time = float(u)
    return (y - math.expm1(-2 * time) * _at(score, y, u)) * math.exp(time)
