"""Gaussian mixtures: data that are not Gaussian, with an exact score.

The sampler's KL comes by quadrature in one dimension; in any dimension it is bounded on path space
by Monte Carlo. Every component has a diagonal covariance. Everything is float64, every divergence
in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_diffusion.diffusion.process import Score, alpha, diffuse, sigma


@dataclass(frozen=True)
class Mixture:
    """The mixture sum_j weights[j] N(means[j], diag(variances[j])); weights [J], others [J, d]."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n draws [n, d]."""
        j = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[j] + self.variances[j].sqrt() * eps

    def second_moment(self) -> float:
        """Return M_2 = E ||X_0||^2."""
        return float((self.weights[:, None] * (self.means.square() + self.variances)).sum())

    def score(self, y: Tensor, u: Tensor) -> Tensor:
        """Return grad log q_u(y) = sum_j r_j(y) (mean_j - y) / var_j, r_j the responsibilities.

        This is a `Score`: y [n, d] and u [n] -> [n, d].
        """
        means, var = self._noised(u)
        shares = self._joint(y, u).softmax(1)
        return (shares[..., None] * (means - y[:, None]) / var).sum(1)

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        """Return log q_u(y), [n]."""
        return self._joint(y, u).logsumexp(1)

    def posterior_trace(self, y: Tensor, u: Tensor) -> Tensor:
        """Return tr Cov(X_0 | X_u = y), [n]: within components, plus between their posterior
        means.
        """
        means, var = self._noised(u)
        shares = self._joint(y, u).softmax(1)[..., None]
        gain = alpha(u)[:, None, None] * self.variances / var
        centres = self.means + gain * (y[:, None] - means)
        within = self.variances * sigma(u).square()[:, None, None] / var
        middle = (shares * centres).sum(1, keepdim=True)
        return (shares * (within + (centres - middle).square())).sum((1, 2))

    def _noised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and variances of the components at times u [n]: [n, J, d]."""
        a, s = alpha(u)[:, None, None], sigma(u)[:, None, None]
        return a * self.means, a.square() * self.variances + s.square()

    def _joint(self, y: Tensor, u: Tensor) -> Tensor:
        """Return log(weights[j] N(y; ...)), [n, J]."""
        means, var = self._noised(u)
        terms = (y[:, None] - means).square() / var + torch.log(2 * math.pi * var)
        return self.weights.log() - terms.sum(2) / 2


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo mean and its standard error."""

    value: float
    error: float


def _estimate(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def dsm_constant(data: Mixture, u: Tensor, n: int, generator: torch.Generator) -> Estimate:
    """Estimate C_1 of Lemma 4.8, -sum_k gamma_k (e^{-2u_k} / sigma_k^4) E tr Cov(X_0 | X_{u_k}).

    The estimate is by Monte Carlo over n draws of the data, each noised afresh at every step; it is
    never above 0.
    """
    x0 = data.sample(n, generator)
    total = torch.zeros(n, dtype=torch.float64)
    for k in range(len(u) - 1):
        times = u[k].expand(n)
        x = diffuse(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), times)
        weight = torch.exp(-2 * u[k]) / sigma(u[k]) ** 4
        total -= (u[k] - u[k + 1]) * weight * data.posterior_trace(x, times)
    return _estimate(total)


def path_space_bound(
    data: Mixture, score: Score, u: Tensor, n: int, generator: torch.Generator
) -> Estimate:
    """KL(q_T || N(0, I)) + sum_k int E ||A_1 - A_3||^2 dt, which is at least KL(q_delta || p_{t_K})
    (Lemmas 4.9 and 4.10, no constant: Girsanov's is 1), for any score.

    Monte Carlo over n paths. In every step the time within it is uniform, A_1 the exact score at
    X_u, A_3 = score(X_{u_k}, u_k), X_{u_k} reached from X_u by (1): unbiased.
    """

    def noise() -> Tensor:
        return torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    x0 = data.sample(n, generator)
    start = u[0].expand(n)
    x = diffuse(x0, noise(), start)
    normal = -(x.square() + math.log(2 * math.pi)).sum(1) / 2
    total = data.log_density(x, start) - normal
    for k in range(len(u) - 1):
        gamma = u[k] - u[k + 1]
        back = gamma * torch.rand(n, generator=generator, dtype=torch.float64)
        x = diffuse(x0, noise(), u[k] - back)
        earlier = diffuse(x, noise(), back)
        off = data.score(x, u[k] - back) - score(earlier, u[k].expand(n))
        total += gamma * off.square().sum(1)
    return _estimate(total)


def quadrature_kl(data: Mixture, score: Score, u: Tensor, *, points: int = 1201) -> float:
    """Return KL(q_delta

    p_{t_K}) in one dimension, by the sampler's density through its kernel.

    Raises
    ------
    ValueError
        The data is not one-dimensional, or the grid too coarse for the smallest step: mass is lost.
    """
    if data.means.shape[1] != 1:
        raise ValueError(f"quadrature is for d = 1; the data has d = {data.means.shape[1]}")
    deviation = data.variances.sqrt().clamp(min=1)
    reach = float((data.means.abs() + 8 * deviation).max())
    y = torch.linspace(-reach, reach, points, dtype=torch.float64)
    h = float(y[1] - y[0])
    p = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        centre = math.exp(g) * y + 2 * math.expm1(g) * score(y[:, None], u[k].expand(points))[:, 0]
        var = math.expm1(2 * g)
        kernel = torch.exp(-(y[:, None] - centre).square() / (2 * var))
        p = kernel @ p * (h / math.sqrt(2 * math.pi * var))
    if not abs(float(p.sum()) * h - 1) < 1e-6:
        raise ValueError(f"{points} points carry a mass of {float(p.sum()) * h:.8f}; use more")
    log_q = data.log_density(y[:, None], u[-1].expand(points))
    q = log_q.exp()
    terms = q * (log_q - p.clamp(min=1e-300).log())
    return float(terms[q > 1e-30].sum() * h)
