"""The exponential integrator against the exact Gaussian oracle."""

import math

import pytest
import torch

from fed_diffusion.diffusion.partitions import PARTITIONS, kappa_minimal
from fed_diffusion.diffusion.samplers import exponential_integrator
from fed_diffusion.theory.gaussian import gaussian_score, sampler_kl, sampler_moments

DIMENSIONS = 3072


def image_like_gaussian():
    lam = 1 / torch.arange(1, DIMENSIONS + 1, dtype=torch.float64)
    return torch.full((DIMENSIONS,), -0.05, dtype=torch.float64), lam / lam.sum() * 768


@pytest.mark.parametrize(
    ("name", "K", "nats"),
    [
        ("uniform", 300, 48.39),
        ("half_half", 300, 0.3993),
        ("kappa_minimal", 300, 0.2180),
        ("geometric", 300, 0.1579),
        ("uniform", 1000, 4.672),
        ("half_half", 1000, 0.03586),
        ("kappa_minimal", 1000, 0.01972),
        ("geometric", 1000, 0.01420),
    ],
)
def test_the_exact_kl_matches_the_checked_values(name, K, nats):
    mu, lam = image_like_gaussian()
    assert sampler_kl(mu, lam, PARTITIONS[name](4.13, 1e-3, K)) == pytest.approx(nats, rel=0.01)


def test_simulated_moments_agree_with_the_recursion():
    mu = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
    lam = torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64)
    u = kappa_minimal(4.0, 1e-2, 40)
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    y = torch.randn((n, 3), generator=generator, dtype=torch.float64)
    y = exponential_integrator(gaussian_score(mu, lam), y, u, generator=generator)
    mean, var = sampler_moments(mu, lam, u)
    assert ((y.mean(0) - mean).abs() < 4.5 * (var / n).sqrt()).all()
    assert ((y.var(0) - var).abs() < 4.5 * var * math.sqrt(2 / n)).all()


def test_a_step_is_the_closed_form_of_appendix_b():
    u = torch.tensor([1.5, 0.7], dtype=torch.float64)
    y0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    noise = torch.randn((1, 2), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = exponential_integrator(
        lambda y, u: -0.3 * y, y0, u, generator=torch.Generator().manual_seed(9)
    )
    g = 0.8
    want = (
        math.exp(g) * y0
        + 2 * (math.exp(g) - 1) * (-0.3 * y0)
        + math.sqrt(math.exp(2 * g) - 1) * noise
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_tweedie_step_gives_the_posterior_mean():
    mu, lam = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    u = torch.tensor([1.0, 0.2], dtype=torch.float64)
    ends = []
    generator = torch.Generator().manual_seed(0)
    out = exponential_integrator(
        gaussian_score(mu, lam),
        torch.zeros((1, 1), dtype=torch.float64),
        u,
        generator=generator,
        denoise=True,
        callback=lambda k, y: ends.append(y.clone()),
    )
    a, var = math.exp(-0.2), math.exp(-0.4) * 0.5 + 1 - math.exp(-0.4)
    posterior = 0.3 + 0.5 * a / var * (float(ends[-1]) - a * 0.3)
    assert float(out) == pytest.approx(posterior, rel=1e-12)


def test_the_callback_sees_every_step_and_the_start_is_left_alone():
    u = kappa_minimal(2.0, 0.1, 7)
    y = torch.ones((2, 3))
    seen = []
    exponential_integrator(lambda y, u: -y, y, u, callback=lambda k, y: seen.append(k))
    assert seen == list(range(7))
    assert (y == 1).all()
