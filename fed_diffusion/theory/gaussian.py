"""Exact oracle: for Gaussian data the sampler's output law, and its KL to the data, in closed form.

For N(mu, diag(lambda)) the score at time u is affine, -(y - e^{-u} mu) / var_u with
var_u = e^{-2u} lambda + 1 - e^{-2u}; so (10) keeps Gaussians Gaussian, eigenvalue by eigenvalue.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fed_diffusion.diffusion.process import Score, alpha


def noised_moments(mu: Tensor, lam: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q_u for N(mu, diag(lam)) data; mu, lam [d], u a scalar."""
    return torch.exp(-u) * mu, torch.exp(-2 * u) * lam - torch.expm1(-2 * u)


def gaussian_score(mu: Tensor, lam: Tensor) -> Score:
    """The exact score of the noised data, as a sampler takes it: (y [n, d], u [n]) -> [n, d]."""

    def score(y: Tensor, u: Tensor) -> Tensor:
        mean = alpha(u)[:, None] * mu
        var = torch.exp(-2 * u)[:, None] * lam - torch.expm1(-2 * u)[:, None]
        return (-(y.double() - mean) / var).to(y.dtype)

    return score


def sampler_moments(mu: Tensor, lam: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [d] of the exponential integrator's output with the exact score.

    Per eigenvalue: m <- A m + 2 expm1(g) mean / var and v <- A^2 v + expm1(2g), with
    A = e^g - 2 expm1(g) / var, from the prior m = 0, v = 1 (method: Appendix B with (1)).
    """
    m, v = torch.zeros_like(mu), torch.ones_like(lam)
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        mean, var = noised_moments(mu, lam, u[k])
        A = math.exp(g) - 2 * math.expm1(g) / var
        m = A * m + 2 * math.expm1(g) * mean / var
        v = A.square() * v + math.expm1(2 * g)
    return m, v


def kl_diagonal(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> float:
    """KL(q || p) in nats between Gaussians with diagonal covariances; all [d]."""
    ratio = var_q / var_p
    shift = (mean_q - mean_p).square() / var_p
    return float(0.5 * (ratio - 1 - torch.log(ratio) + shift).sum())


def sampler_kl(mu: Tensor, lam: Tensor, u: Tensor) -> float:
    """Exact KL(q_delta || p_{t_K}) of the sampler with the exact score, in nats."""
    return kl_diagonal(*noised_moments(mu, lam, u[-1]), *sampler_moments(mu, lam, u))
