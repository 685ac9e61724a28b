"""The samplers against the exact Gaussian oracle, and each step against its formula."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.config.schema import EvaluationConfig
from fed_diffusion.diffusion.partitions import PARTITIONS, kappa_minimal
from fed_diffusion.diffusion.samplers import (
    FEW_STEPS,
    SAMPLERS,
    exponential_integrator,
    probability_flow,
    second_order,
    second_order_sde,
)
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


@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS)
def test_the_tweedie_step_gives_the_posterior_mean(solve):
    mu, lam = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    u = torch.tensor([1.0, 0.2], dtype=torch.float64)
    ends = []
    generator = torch.Generator().manual_seed(0)
    out = solve(
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


@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS)
def test_the_callback_sees_every_step_and_the_start_is_left_alone(solve):
    u = kappa_minimal(2.0, 0.1, 7)
    y = torch.ones((2, 3))
    seen = []
    solve(lambda y, u: -y, y, u, callback=lambda k, y: seen.append(k))
    assert seen == list(range(7))
    assert (y == 1).all()


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sampler_asks_for_the_score_once_a_step_at_the_times_of_the_partition(solve, denoise):
    u = kappa_minimal(2.0, 0.1, 7)
    asked = []

    def score(y, time):
        asked.append(float(time[0]))
        return -y

    solve(score, torch.ones((2, 3)), u, denoise=denoise)
    assert asked == u.tolist()[: 7 + denoise]


def test_the_settings_name_every_sampler_and_the_default_is_the_papers():
    for name in SAMPLERS:
        assert EvaluationConfig(sampler=name).sampler == name
    with pytest.raises(ValueError, match=f"Allowed: {', '.join(SAMPLERS)}, or module:attribute"):
        EvaluationConfig(sampler="euler")
    assert SAMPLERS[EvaluationConfig().sampler] is exponential_integrator


@pytest.mark.parametrize("denoise", [False, True])
def test_the_reference_keeps_its_bits(denoise):
    """An independent copy of Appendix B, operation by operation, in float32."""
    u = kappa_minimal(3.0, 0.02, 9)

    def score(y, time):
        return -y / (1 + time[:, None].to(y.dtype))

    start = torch.randn((5, 2), generator=torch.Generator().manual_seed(1))
    noise, y = torch.Generator().manual_seed(2), start
    for now, then in pairwise(u):
        g = float(now - then)
        eps = torch.randn((5, 2), generator=noise)
        drift = score(y, now.expand(5))
        y = math.exp(g) * y + 2 * math.expm1(g) * drift + math.sqrt(math.expm1(2 * g)) * eps
    if denoise:
        delta = float(u[-1])
        y = (y - math.expm1(-2 * delta) * score(y, u[-1].expand(5))) * math.exp(delta)
    again = torch.Generator().manual_seed(2)
    got = exponential_integrator(score, start, u, generator=again, denoise=denoise)
    assert torch.equal(got, y)


# the probability-flow ODE

ODE = {"probability_flow": 1, "second_order": 2}
MU = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
LAM = torch.tensor([0.05, 1.0, 3.0], dtype=torch.float64)


def moments(name, u):
    """Mean and standard deviation of the output: the map is affine, so two starts tell it all."""
    starts = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    at_zero, at_one = SAMPLERS[name](gaussian_score(MU, LAM), starts, u)
    return at_zero, at_one - at_zero


def exact_moments(T, delta):
    """The ODE's exact flow keeps (Y - mean_u) / sqrt(var_u) constant; the start is N(0, I)."""

    def law(u):
        return math.exp(-u) * MU, (math.exp(-2 * u) * LAM + 1 - math.exp(-2 * u)).sqrt()

    (mean_T, sd_T), (mean, sd) = law(T), law(delta)
    return mean - sd / sd_T * mean_T, sd / sd_T


@pytest.mark.parametrize("partition", ["kappa_minimal", "geometric"])
@pytest.mark.parametrize(("name", "order"), ODE.items(), ids=ODE)
def test_the_error_of_the_moments_falls_with_the_order_of_the_sampler(name, order, partition):
    counts = [160, 320, 640]
    mean, sd = exact_moments(4.0, 0.01)
    errors = []
    for K in counts:
        got_mean, got_sd = moments(name, PARTITIONS[partition](4.0, 0.01, K))
        errors.append(float(torch.cat([got_mean - mean, got_sd - sd]).norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)
    assert errors[-1] < {1: 0.01, 2: 0.0001}[order]


@pytest.mark.parametrize("name", ODE)
def test_an_ode_sampler_draws_no_noise(name):
    u = kappa_minimal(2.0, 0.1, 7)
    y = torch.randn((4, 3), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state(), torch.get_rng_state()
    first = SAMPLERS[name](gaussian_score(MU, LAM), y, u, generator=generator)
    assert torch.equal(first, SAMPLERS[name](gaussian_score(MU, LAM), y, u))
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


times = st.floats(0.01, 5.0)


@given(now=times, ratio=st.floats(0.05, 0.95), y=st.floats(-3, 3), s=st.floats(-3, 3))
def test_a_first_step_holds_the_noise_estimate_and_the_image_estimate_alike(now, ratio, y, s):
    """DDIM as its authors write it: the image estimate and the noise estimate, mixed anew."""
    then = ratio * now
    u = torch.tensor([now, then], dtype=torch.float64)
    sd, sd_then = (math.sqrt(1 - math.exp(-2 * t)) for t in (now, then))
    eps = -sd * s
    x0 = (y - sd * eps) / math.exp(-now)
    want = math.exp(-then) * x0 + sd_then * eps
    start = torch.full((1, 1), y, dtype=torch.float64)
    for solve in (probability_flow, second_order):
        got = solve(lambda y, u: torch.full_like(y, s), start, u)
        assert float(got) == pytest.approx(want, rel=1e-9, abs=1e-9)


@settings(max_examples=50)
@given(x0=st.floats(-2, 2), y=st.floats(-3, 3), K=st.integers(1, 40))
def test_one_image_as_the_data_is_reached_exactly_in_any_number_of_steps(x0, y, K):
    """The score is -(y - alpha x0) / sigma^2, and the flow keeps (y - alpha x0) / sigma."""

    def score(y, u):
        return -(y - torch.exp(-u)[:, None] * x0) / -torch.expm1(-2 * u)[:, None]

    u = PARTITIONS["geometric"](4.0, 0.01, K)
    alpha, sd = torch.exp(-u), torch.sqrt(-torch.expm1(-2 * u))
    want = float(alpha[-1] * x0 + sd[-1] / sd[0] * (y - alpha[0] * x0))
    start = torch.full((1, 1), y, dtype=torch.float64)
    for name in ODE:
        assert float(SAMPLERS[name](score, start, u)) == pytest.approx(want, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("K", [3, FEW_STEPS - 1, FEW_STEPS])
def test_a_second_order_step_extrapolates_the_image_estimate_but_at_the_ends(K):
    """Algorithm 2 of DPM-Solver++ in NumPy, in its own symbols; the last step where K is small."""
    u = kappa_minimal(3.0, 0.1, K)
    alpha, sd = np.exp(-u.numpy()), np.sqrt(1 - np.exp(-2 * u.numpy()))
    lam = np.log(alpha / sd)

    def score(y, time):
        return -torch.tanh(y) * (1 + time[:, None])

    states = []
    y = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    second_order(score, y, u, callback=lambda k, y: states.append(y.numpy()))
    x, older = y.numpy(), None
    for k in range(K):
        image = (x + sd[k] ** 2 * score(torch.from_numpy(x), u[k].expand(2)).numpy()) / alpha[k]
        h = lam[k + 1] - lam[k]
        D = image
        if k > 0 and (k < K - 1 or K >= 15):
            r = (lam[k] - lam[k - 1]) / h
            D = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * older
        x = sd[k + 1] / sd[k] * x - alpha[k + 1] * (np.exp(-h) - 1) * D
        np.testing.assert_allclose(states[k], x, rtol=1e-10)
        older = image


@pytest.mark.parametrize("K", [3, FEW_STEPS])
def test_the_noisy_second_order_step_is_its_formula(K):
    """SDE-DPM-Solver++(2M) in NumPy, in its authors' symbols, with the same noise."""
    u = kappa_minimal(3.0, 0.1, K)
    alpha, sd = np.exp(-u.numpy()), np.sqrt(1 - np.exp(-2 * u.numpy()))
    lam = np.log(alpha / sd)

    def score(y, time):
        return -torch.tanh(y) * (1 + time[:, None])

    states = []
    y = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    noise = torch.Generator().manual_seed(4)
    second_order_sde(
        score, y, u, generator=noise, callback=lambda k, y: states.append(y.numpy().copy())
    )
    noise.manual_seed(4)
    x, older = y.numpy(), None
    for k in range(K):
        image = (x + sd[k] ** 2 * score(torch.from_numpy(x), u[k].expand(2)).numpy()) / alpha[k]
        h = lam[k + 1] - lam[k]
        D = image
        if k > 0 and (k < K - 1 or K >= 15):
            r = (lam[k] - lam[k - 1]) / h
            D = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * older
        z = torch.randn((2, 1), generator=noise, dtype=torch.float64).numpy()
        x = sd[k + 1] / sd[k] * np.exp(-h) * x + alpha[k + 1] * (1 - np.exp(-2 * h)) * D
        x = x + sd[k + 1] * np.sqrt(1 - np.exp(-2 * h)) * z
        np.testing.assert_allclose(states[k], x, rtol=1e-10)
        older = image


def test_the_noisy_second_order_sampler_is_nearer_to_the_data_than_the_reference():
    """Gaussian data: exact mean and variance of the output against the noised data's."""
    u = kappa_minimal(4.0, 0.01, 20)
    mean, var = math.exp(-0.01) * MU, math.exp(-0.02) * LAM + 1 - math.exp(-0.02)
    n, errors = 200_000, {}
    for name in ("exponential_integrator", "second_order_sde"):
        noise = torch.Generator().manual_seed(0)
        y = torch.randn((n, 3), generator=noise, dtype=torch.float64)
        y = SAMPLERS[name](gaussian_score(MU, LAM), y, u, generator=noise)
        errors[name] = ((y.mean(0) - mean) / var.sqrt()).square() + (y.var(0) / var).log().square()
    # the spread of both estimates is below 0.01
    assert (
        errors["second_order_sde"].sum().sqrt()
        < 0.5 * errors["exponential_integrator"].sum().sqrt()
    )
