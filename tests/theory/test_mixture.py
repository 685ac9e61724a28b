"""Gaussian mixtures: the score against autograd, the divergences against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.diffusion.partitions import gammas, kappa_minimal
from fed_diffusion.theory import gaussian, mixture
from fed_diffusion.theory.mixture import Mixture

U = kappa_minimal(2.0, 0.05, 20)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def generator():
    return torch.Generator().manual_seed(0)


TWO = Mixture(tensor([0.3, 0.7]), tensor([[-1.0], [1.0]]), tensor([[0.1], [0.05]]))
PLANE = Mixture(
    tensor([0.5, 0.2, 0.3]),
    tensor([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]]),
    tensor([[0.2, 0.05], [0.5, 1.0], [0.1, 0.3]]),
)
ONE = Mixture(tensor([1.0]), tensor([[0.5]]), tensor([[0.2]]))


@st.composite
def mixtures(draw):
    d, J = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weights = torch.rand(J, generator=numbers, dtype=torch.float64) + 0.05
    return Mixture(
        weights / weights.sum(),
        2 * torch.randn(J, d, generator=numbers, dtype=torch.float64),
        torch.rand(J, d, generator=numbers, dtype=torch.float64) + 0.01,
    )


@given(mixtures(), st.floats(0.01, 3.0))
@settings(max_examples=25, deadline=None)
def test_the_score_is_the_gradient_of_the_log_density(data, time):
    y = torch.randn(5, data.means.shape[1], generator=generator(), dtype=torch.float64)
    y.requires_grad_()
    u = tensor(time).expand(5)
    (want,) = torch.autograd.grad(data.log_density(y, u).sum(), y)
    torch.testing.assert_close(data.score(y.detach(), u), want, rtol=1e-8, atol=1e-8)


@given(mixtures(), st.floats(0.05, 2.0))
@settings(max_examples=25, deadline=None)
def test_the_posterior_trace_is_the_laplacian_of_the_log_density(data, time):
    """Tweedie, second order: Cov(X_0 | y) = e^{2u} (sigma^2 I + sigma^4 Hessian log q_u(y))."""
    d = data.means.shape[1]
    y = torch.randn(1, d, generator=generator(), dtype=torch.float64)
    u = tensor(time).expand(1)
    hessian = torch.autograd.functional.hessian(
        lambda point: data.log_density(point[None], u)[0], y[0]
    )
    s2 = 1 - math.exp(-2 * time)
    want = math.exp(2 * time) * (s2 * d + s2**2 * float(hessian.trace()))
    assert float(data.posterior_trace(y, u)) == pytest.approx(want, rel=1e-6, abs=1e-6)


@given(mixtures())
@settings(max_examples=10, deadline=None)
def test_c1_is_never_positive(data):
    assert mixture.dsm_constant(data, U, 50, generator()).value <= 0


def test_c1_is_the_scores_second_moment_less_that_of_the_noise():
    """The proof of Lemma 4.8 has C_1 = sum_k gamma_k (E ||grad log q||^2 - d / sigma_k^2)."""
    y = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    want = 0.0
    for gamma, time in zip(gammas(U), U[:-1], strict=True):
        u = time.expand(len(y))
        q = TWO.log_density(y, u).exp()
        fisher = float((q * TWO.score(y, u)[:, 0].square()).sum() * (y[1] - y[0]))
        want += float(gamma) * (fisher - 1 / (1 - math.exp(-2 * float(time))))
    got = mixture.dsm_constant(TWO, U, 20_000, generator())
    assert abs(got.value - want) < 4.5 * got.error
    assert want < -20 * got.error


def test_c1_of_one_component_is_the_gaussians():
    got = mixture.dsm_constant(ONE, U, 10, generator())
    assert got.value == pytest.approx(gaussian.dsm_constant(tensor([0.2]), U), rel=1e-12)


def test_quadrature_gives_the_gaussians_divergence():
    want = gaussian.sampler_kl(tensor([0.5]), tensor([0.2]), U)
    assert mixture.quadrature_kl(ONE, ONE.score, U, points=801) == pytest.approx(want, rel=1e-6)


def test_quadrature_sees_a_perturbed_score():
    error = torch.full((2, 20, 1), 0.2, dtype=torch.float64)
    want = gaussian.sampler_kl(tensor([0.5]), tensor([0.2]), U, error=(error[0], error[1]))
    got = mixture.quadrature_kl(ONE, lambda y, u: ONE.score(y, u) + 0.2 * y + 0.2, U, points=801)
    assert got == pytest.approx(want, rel=1e-6)


def test_quadrature_agrees_with_a_simulated_density():
    """Two steps: the first simulated, the second's kernel averaged over where it ended."""
    u = kappa_minimal(1.0, 0.4, 2)

    def score(y, times):  # far enough off for a divergence that noise cannot hide
        return TWO.score(y, times) + 1.0

    n = 20_000
    y = torch.randn(n, 1, generator=generator(), dtype=torch.float64)
    for k in (0, 1):
        gamma = float(u[k] - u[k + 1])
        centre = math.exp(gamma) * y + 2 * math.expm1(gamma) * score(y, u[k].expand(n))
        var = math.expm1(2 * gamma)
        noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        y = centre + math.sqrt(var) * noise
    grid = torch.linspace(-6, 6, 401, dtype=torch.float64)
    kernel = torch.exp(-(grid[:, None] - centre[:, 0]).square() / (2 * var))
    log_p = (kernel.mean(1) / math.sqrt(2 * math.pi * var)).log()
    log_q = TWO.log_density(grid[:, None], u[-1].expand(401))
    want = float((log_q.exp() * (log_q - log_p)).sum() * (grid[1] - grid[0]))
    assert mixture.quadrature_kl(TWO, score, u) == pytest.approx(want, rel=0.03)


def test_path_space_agrees_with_the_closed_form_for_one_component():
    mu, lam = tensor([0.5]), tensor([0.2])
    want = gaussian.prior_kl(mu, lam, U[0]) + gaussian.discretisation_error(lam, U)
    got = mixture.path_space_bound(ONE, ONE.score, U, 20_000, generator())
    assert abs(got.value - want) < 4.5 * got.error
    assert want > 20 * got.error


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_path_space_bounds_the_divergence_by_quadrature(shift):
    def score(y, u):
        return TWO.score(y, u) + shift

    exact = mixture.quadrature_kl(TWO, score, U, points=801)
    bound = mixture.path_space_bound(TWO, score, U, 20_000, generator())
    assert 0 < exact < bound.value - 4.5 * bound.error


def test_a_constant_error_of_the_score_adds_its_square_to_path_space():
    """A_1 - A_2 has mean zero, so a shift c adds (T - delta) ||c||^2."""
    exact = mixture.path_space_bound(PLANE, PLANE.score, U, 20_000, generator())
    off = mixture.path_space_bound(
        PLANE, lambda y, u: PLANE.score(y, u) + 0.5, U, 20_000, generator()
    )
    want = (2.0 - 0.05) * 0.5
    assert abs(off.value - exact.value - want) < 4.5 * (off.error + exact.error)
    assert want > 20 * off.error


def test_samples_have_the_mixtures_moments():
    x = PLANE.sample(50_000, generator())
    squares = x.square().sum(1)
    assert abs(float(squares.mean()) - PLANE.second_moment()) < 4.5 * float(squares.std()) / 223
    mean = (PLANE.weights[:, None] * PLANE.means).sum(0)
    assert ((x.mean(0) - mean).abs() < 4.5 * x.std(0) / 223).all()


def test_a_grid_too_coarse_and_data_of_two_dimensions_are_refused():
    with pytest.raises(ValueError, match="use more"):
        mixture.quadrature_kl(TWO, TWO.score, kappa_minimal(2.0, 1e-3, 30), points=101)
    with pytest.raises(ValueError, match="d = 2"):
        mixture.quadrature_kl(PLANE, PLANE.score, U)
