"""The Gaussian oracle: closed forms against simulation, quadrature and each other."""

import math

import pytest
import torch
from scipy.integrate import quad

from fed_diffusion.diffusion.partitions import kappa_minimal, loss_weights
from fed_diffusion.diffusion.process import diffuse
from fed_diffusion.diffusion.samplers import exponential_integrator
from fed_diffusion.theory import gaussian as g

D = 3072
MU = torch.full((D,), -0.05, dtype=torch.float64)
LAM = 1 / torch.arange(1, D + 1, dtype=torch.float64)
LAM *= 768 / LAM.sum()


def random_gaussian(d, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), root @ root.T / d


def perturbed(score, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)

    def off(like):
        return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    return g.AffineScore(score.W + off(score.W), score.b + off(score.b))


def as_function(score, u):
    """An affine score the way a sampler takes it."""
    index = {float(time): k for k, time in enumerate(u[:-1])}

    def of(y, times):
        k = index[float(times[0])]
        return y @ score.W[k].T + score.b[k]

    return of


def test_the_matrix_recursion_is_the_eigenvalue_recursion_for_diagonal_data():
    mu, lam = torch.tensor([-0.5, 1.0, 0.2]).double(), torch.tensor([0.05, 1.0, 3.0]).double()
    u = kappa_minimal(3.0, 1e-2, 40)
    score = g.exact_affine_score(mu, lam.diag(), u)
    assert g.affine_kl(mu, lam.diag(), score, u) == pytest.approx(
        g.sampler_kl(mu, lam, u), rel=1e-9
    )
    generator = torch.Generator().manual_seed(3)
    a, b = 0.1 * torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    off = g.AffineScore(score.W + torch.diag_embed(a), score.b + b)
    want = g.sampler_kl(mu, lam, u, error=(a, b))
    assert g.affine_kl(mu, lam.diag(), off, u) == pytest.approx(want, rel=1e-9)
    assert want > g.sampler_kl(mu, lam, u)


def test_the_exact_score_does_not_see_the_basis():
    mu, cov = random_gaussian(4, 0)
    u = kappa_minimal(3.0, 1e-2, 40)
    lam, basis = torch.linalg.eigh(cov)
    got = g.affine_kl(mu, cov, g.exact_affine_score(mu, cov, u), u)
    assert got == pytest.approx(g.sampler_kl(basis.T @ mu, lam, u), rel=1e-8)


def test_simulated_moments_agree_with_the_matrix_recursion():
    mu, cov = random_gaussian(3, 1)
    u = kappa_minimal(2.0, 5e-2, 20)
    score = perturbed(g.exact_affine_score(mu, cov, u), 2)
    mean, V = g.affine_moments(score, u)
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    y = torch.randn((n, 3), generator=generator, dtype=torch.float64)
    y = exponential_integrator(as_function(score, u), y, u, generator=generator)
    var = V.diagonal()
    assert ((y.mean(0) - mean).abs() < 4.5 * (var / n).sqrt()).all()
    spread = ((V.square() + var[:, None] * var) / n).sqrt()  # of a sample covariance's entries
    assert ((torch.cov(y.T) - V).abs() < 4.5 * spread).all()


def test_the_divergence_of_two_gaussians_is_torchs():
    (m_q, V_q), (m_p, V_p) = random_gaussian(4, 5), random_gaussian(4, 6)
    normal = torch.distributions.MultivariateNormal
    want = float(torch.distributions.kl_divergence(normal(m_q, V_q), normal(m_p, V_p)))
    assert g.kl_full(m_q, V_q, m_p, V_p) == pytest.approx(want, rel=1e-9)
    lam = V_q.diagonal(), V_p.diagonal()
    want = g.kl_full(m_q, lam[0].diag(), m_p, lam[1].diag())
    assert g.kl_diagonal(m_q, lam[0], m_p, lam[1]) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("lam", [0.05, 1.0, 90.0])
def test_the_discretisation_error_is_its_integral(lam):
    u = kappa_minimal(2.0, 1e-2, 12)
    total = 0.0
    for k in range(len(u) - 1):
        start, end = float(u[k]), float(u[k + 1])

        def var(time):
            return math.exp(-2 * time) * lam + 1 - math.exp(-2 * time)

        def difference(time, start=start):
            # E (A_1 - A_2)^2, the three moments of (X_u, X_{u_k}) one by one
            together = math.exp(-(start - time)) * var(time)
            return (
                var(time) / var(time) ** 2
                + var(start) / var(start) ** 2
                - 2 * together / (var(time) * var(start))
            )

        total += quad(difference, end, start, epsrel=1e-11)[0]
    got = g.discretisation_error(torch.tensor([lam], dtype=torch.float64), u)
    assert got == pytest.approx(total, rel=1e-8)


def test_path_space_bounds_the_exact_divergence():
    for K in (30, 300):
        u = kappa_minimal(4.13, 1e-3, K)
        assert g.sampler_kl(MU, LAM, u) <= g.prior_kl(MU, LAM, u[0]) + g.discretisation_error(
            LAM, u
        )


def test_many_steps_approach_the_continuous_process():
    mu, lam = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.2, 4.0]).double()
    limit = g.continuous_moments(mu, lam, 1.5, 0.1)
    errors = []
    for K in (100, 200, 400):
        moments = g.sampler_moments(mu, lam, kappa_minimal(1.5, 0.1, K))
        errors.append(max(float((a - b).abs().max()) for a, b in zip(moments, limit, strict=True)))
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # the integrator is of first order
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.1)


def test_the_priors_mismatch_is_within_half_of_lemma_4_10():
    for T in (1.0, 2.0, 4.13):
        M2 = float(MU.square().sum() + LAM.sum())
        exact = g.prior_kl(MU, LAM, torch.tensor(T, dtype=torch.float64))
        assert exact <= (D + M2) * math.exp(-2 * T) / 2


def test_an_exact_score_has_the_loss_of_minus_c1():
    u = kappa_minimal(4.13, 1e-3, 300)
    assert -g.dsm_constant(LAM, u) == pytest.approx(5576, rel=1e-3)
    assert D * float(loss_weights(u).sum()) == pytest.approx(22052, rel=1e-3)


def test_the_score_error_is_the_denoising_loss_plus_c1():
    """Lemma 4.8, the loss (5) by simulation."""
    mu, cov = random_gaussian(3, 8)
    u = kappa_minimal(1.5, 0.2, 8)
    score = perturbed(g.exact_affine_score(mu, cov, u), 9, size=0.5)
    n = 100_000
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(n, 3, generator=generator, dtype=torch.float64)

    x0 = mu + noise() @ torch.linalg.cholesky(cov).T
    loss = torch.zeros(n, dtype=torch.float64)
    for k in range(8):
        eps = noise()
        x = diffuse(x0, eps, u[k].expand(n))
        target = -eps / math.sqrt(-math.expm1(-2 * float(u[k])))
        estimate = x @ score.W[k].T + score.b[k]
        loss += (u[k] - u[k + 1]) * (estimate - target).square().sum(1)
    want = float(loss.mean()) + g.dsm_constant(torch.linalg.eigvalsh(cov), u)
    got = g.score_error(mu, cov, score, u)
    assert abs(got - want) < 4.5 * float(loss.std()) / math.sqrt(n)
    assert got > 20 * float(loss.std()) / math.sqrt(n)  # or the line above could not fail
    assert g.score_error(mu, cov, g.exact_affine_score(mu, cov, u), u) == pytest.approx(0, abs=1e-9)


def test_the_exact_score_of_pooled_moments_is_the_best_affine_score_for_all():
    gaussians = [random_gaussian(3, seed) for seed in (11, 12)]
    u = kappa_minimal(1.5, 0.2, 8)
    mean = sum(mu for mu, _ in gaussians) / 2
    second = sum(cov + mu.outer(mu) for mu, cov in gaussians) / 2
    best = g.exact_affine_score(mean, second - mean.outer(mean), u)

    def loss(score):  # F up to a constant
        return sum(g.score_error(mu, cov, score, u) for mu, cov in gaussians)

    assert all(loss(best) < loss(perturbed(best, seed, 0.01)) for seed in range(20))
