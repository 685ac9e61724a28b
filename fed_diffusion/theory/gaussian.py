"""Exact oracle: for Gaussian data the sampler's output law, and its KL to the data, in closed form.

For N(mu, cov) the score at time u is affine, -V_u^{-1} (y - e^{-u} mu) with V_u = e^{-2u} cov +
sigma_u^2 I; so (10) keeps Gaussians Gaussian: eigenvalue by eigenvalue where the score and the
covariance commute (functions that take `lam`, [d]), and matrix by matrix for any affine score
(functions that take `cov`, [d, d]). Everything is float64, every divergence in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fed_diffusion.diffusion.partitions import gammas
from fed_diffusion.diffusion.process import Score, alpha


def noised_moments(mu: Tensor, lam: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of q_u for N(mu, diag(lam)) data; mu, lam [d], u a scalar."""
    return torch.exp(-u) * mu, torch.exp(-2 * u) * lam - torch.expm1(-2 * u)


def gaussian_score(mu: Tensor, lam: Tensor) -> Score:
    """Return the exact score of the noised data, as a sampler takes it: (y [n, d], u [n]) -> [n,
    d].
    """

    def score(y: Tensor, u: Tensor) -> Tensor:
        mean = alpha(u)[:, None] * mu
        var = torch.exp(-2 * u)[:, None] * lam - torch.expm1(-2 * u)[:, None]
        return (-(y.double() - mean) / var).to(y.dtype)

    return score


def sampler_moments(
    mu: Tensor, lam: Tensor, u: Tensor, error: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and variance [d] of the exponential integrator's output, score exact or
    perturbed.

    Per eigenvalue: m <- A m + 2 expm1(g) mean / var and v <- A^2 v + expm1(2g), with
    A = e^g - 2 expm1(g) / var, from the prior m = 0, v = 1 (method: Appendix B with (1)).

    Parameters
    ----------
    mu, lam
        The data's mean and variances [d].
    u
        The partition [K + 1].
    error
        (a, b), both [K, d]: the score is off by a[k] y + b[k] in step k.
    """
    m, v = torch.zeros_like(mu), torch.ones_like(lam)
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        mean, var = noised_moments(mu, lam, u[k])
        slope, shift = -1 / var, mean / var
        if error is not None:
            slope, shift = slope + error[0][k], shift + error[1][k]
        A = math.exp(g) + 2 * math.expm1(g) * slope
        m = A * m + 2 * math.expm1(g) * shift
        v = A.square() * v + math.expm1(2 * g)
    return m, v


def continuous_moments(mu: Tensor, lam: Tensor, T: float, delta: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance [d] of the sampler's output, exact score, as K goes to infinity.

    What is left is the prior's mismatch: (3) from N(0, I) carries a deviation of the mean from
    u = T to delta by Phi = exp(int 1 - 2 / var) = e^{T - delta} (e^{2 delta} + lam - 1) /
    (e^{2T} + lam - 1), one of the variance by Phi^2.
    """
    start, end = (torch.tensor(x, dtype=torch.float64) for x in (T, delta))
    (mean_T, var_T), (mean, var) = noised_moments(mu, lam, start), noised_moments(mu, lam, end)
    Phi = math.exp(delta - T) * var / var_T
    return mean - Phi * mean_T, var + Phi.square() * (1 - var_T)


def kl_diagonal(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> float:
    """Return KL(q

    p) in nats between Gaussians with diagonal covariances; all [d].
    """
    ratio = var_q / var_p
    shift = (mean_q - mean_p).square() / var_p
    return float(0.5 * (ratio - 1 - torch.log(ratio) + shift).sum())


def sampler_kl(
    mu: Tensor, lam: Tensor, u: Tensor, error: tuple[Tensor, Tensor] | None = None
) -> float:
    """Return the exact KL(q_delta

    p_{t_K}) in nats of the sampler, its score off by `error`.
    """
    return kl_diagonal(*noised_moments(mu, lam, u[-1]), *sampler_moments(mu, lam, u, error))


def prior_kl(mu: Tensor, lam: Tensor, T: Tensor) -> float:
    """Return KL(q_T

    N(0, I)), bounded in Lemma 4.10 by (d + M_2) e^{-2T} / 2; mu, lam [d].
    """
    return kl_diagonal(*noised_moments(mu, lam, T), torch.zeros_like(mu), torch.ones_like(lam))


def discretisation_error(lam: Tensor, u: Tensor) -> float:
    """Return the left side of Lemma 4.5, sum_k int E ||A_1 - A_2||^2 dt, in closed form.

    (X_u, X_{u_k}) have covariance e^{-(u_k - u)} var_u, so that per eigenvalue E |A_1 - A_2|^2 =
    1 / var_u + (1 - 2 e^{-(u_k - u)}) / var_k; it integrates to log1p(expm1(2g) / var_{k+1}) / 2 +
    (g + 2 expm1(-g)) / var_k. With the exact score, KL(q_T || N(0, I)) plus this bounds the KL.
    """
    total = 0.0
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        before, after = (noised_moments(lam, lam, u[j])[1] for j in (k, k + 1))
        path = torch.log1p(math.expm1(2 * g) / after) / 2
        total += float((path + (g + 2 * math.expm1(-g)) / before).sum())
    return total


def dsm_constant(lam: Tensor, u: Tensor) -> float:
    """Return C_1 of Lemma 4.8, -sum_k gamma_k (e^{-2u_k} / sigma_k^4) tr Cov(X_0 | X_{u_k}) <= 0.

    lam [d] are the eigenvalues of the data's covariance; tr Cov = sum lam sigma^2 / var. An exact
    score has F_n = -C_1.
    """
    total = 0.0
    for gamma, time in zip(gammas(u), u[:-1], strict=True):
        noise = -torch.expm1(-2 * time)
        var = torch.exp(-2 * time) * lam + noise
        total -= float(gamma * torch.exp(-2 * time) / noise * (lam / var).sum())
    return total


@dataclass(frozen=True)
class AffineScore:
    """One affine map per step, s(y, u_k) = W[k] y + b[k]; W [K, d, d], b [K, d], float64."""

    W: Tensor
    b: Tensor


def noised_covariance(cov: Tensor, u: Tensor) -> Tensor:
    """Return V_u = e^{-2u} cov + sigma_u^2 I: [d, d] for a scalar u, [K, d, d] for K times."""
    eye = torch.eye(len(cov), dtype=cov.dtype)
    return torch.exp(-2 * u)[..., None, None] * cov - torch.expm1(-2 * u)[..., None, None] * eye


def exact_affine_score(mu: Tensor, cov: Tensor, u: Tensor) -> AffineScore:
    """Return the exact score of N(mu, cov) data at u_0 .. u_{K-1}, as affine maps.

    For any data with these moments it is the affine score of least F_n.
    """
    W = -torch.linalg.inv(noised_covariance(cov, u[:-1]))
    return AffineScore(W, -torch.einsum("kij,kj->ki", W, torch.exp(-u[:-1])[:, None] * mu))


def affine_moments(score: AffineScore, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [d] and covariance [d, d] of the sampler's output with any affine score.

    m <- A m + 2 expm1(g) b and V <- A V A^T + expm1(2g) I with A = e^g I + 2 expm1(g) W, from
    m = 0, V = I (Appendix B); no two of the matrices need commute.
    """
    eye = torch.eye(score.b.shape[1], dtype=score.b.dtype)
    m, V = torch.zeros_like(score.b[0]), eye
    for k in range(len(u) - 1):
        g = float(u[k] - u[k + 1])
        A = math.exp(g) * eye + 2 * math.expm1(g) * score.W[k]
        m = A @ m + 2 * math.expm1(g) * score.b[k]
        V = A @ V @ A.T + math.expm1(2 * g) * eye
    return m, V


def kl_full(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> float:
    """Return KL(q

    p) in nats between Gaussians; means [d], covariances [d, d].
    """
    root_p, root_q = torch.linalg.cholesky(cov_p), torch.linalg.cholesky(cov_q)
    ratio = torch.linalg.solve_triangular(root_p, root_q, upper=False)
    shift = torch.linalg.solve_triangular(root_p, (mean_q - mean_p)[:, None], upper=False)
    log_det = 2 * (root_p.diagonal().log() - root_q.diagonal().log()).sum()
    return float(0.5 * (ratio.square().sum() - len(mean_q) + shift.square().sum() + log_det))


def noised_gaussian(mu: Tensor, cov: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [d] and covariance [d, d] of q_u for N(mu, cov) data, u a scalar."""
    return torch.exp(-u) * mu, noised_covariance(cov, u)


def affine_kl(mu: Tensor, cov: Tensor, score: AffineScore, u: Tensor) -> float:
    """Return the exact KL(q_delta

    p_{t_K}) of the sampler with an affine score, in nats.
    """
    return kl_full(*noised_gaussian(mu, cov, u[-1]), *affine_moments(score, u))


def score_error(mu: Tensor, cov: Tensor, score: AffineScore, u: Tensor) -> float:
    """Return sum_k gamma_k E ||A_3 - A_2||^2, which by Lemma 4.8 is F_n + C_1, for an affine score.

    The difference to the exact score is E x + c with E = W + V^{-1} and mean W mean + b, so that
    E ||.||^2 = tr(E V E^T) + ||W mean + b||^2.
    """
    V = noised_covariance(cov, u[:-1])
    off = score.W + torch.linalg.inv(V)
    mean = torch.exp(-u[:-1])[:, None] * mu
    bias = torch.einsum("kij,kj->ki", score.W, mean) + score.b
    spread = torch.einsum("kij,kjl,kil->k", off, V, off)
    return float((gammas(u) * (spread + bias.square().sum(1))).sum())
