"""Estimates against closed forms: within the intervals they state, as often as they claim."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.data import to_unit
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import kappa_minimal, loss_weights
from fed_diffusion.diffusion.process import diffuse
from fed_diffusion.theory import estimates
from fed_diffusion.theory.curvature import hessian_vector, largest_curvature
from fed_diffusion.theory.estimates import Estimate
from fed_diffusion.theory.sketch import Sketch

D = 12
HESSIAN = torch.diag(torch.linspace(0.5, 4.0, D, dtype=torch.float64))
"""Shared by every worker: F_n(theta) = <theta - a_n, H (theta - a_n)> / 2."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def quadratics(seed, theta, workers=20, minibatches=4, noise=0.3):
    """Noisy gradients [N, m, D] of quadratics with one Hessian, and their exact ones [N, D].

    Theirs is H (theta - a_n) with a_n about 0; a minibatch adds noise^2 in every coordinate.
    """
    minima = 0.2 * torch.randn(workers, D, generator=seeded(0), dtype=torch.float64)
    exact = (theta - minima) @ HESSIAN
    shape = (workers, minibatches, D)
    drawn = torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
    return exact[:, None] + noise * drawn, exact


def covered(pairs):
    """How many of (estimate, exact value) are within the stated intervals."""
    return sum(abs(found.value - exact) <= found.error for found, exact in pairs)


THETA = torch.linspace(-1, 1, D, dtype=torch.float64)
SEEDS = range(1, 101)


def test_sigma_1_is_the_variance_of_the_minibatches():
    found = [estimates.gradient_variance(quadratics(s, THETA)[0], sketched=False) for s in SEEDS]
    exact = D * 0.3**2
    assert covered((e, exact) for e in found) >= 88  # of 100 at 95 %
    assert np.mean([e.value for e in found]) == pytest.approx(exact, rel=0.02)


def test_sigma_2_is_free_of_the_minibatches_noise():
    _, exact = quadratics(1, THETA)
    apart = float((exact - exact.mean(0)).square().sum(1).mean())
    drawn = [quadratics(s, THETA, minibatches=2)[0] for s in SEEDS]
    found = [estimates.gradient_distance(g, sketched=False) for g in drawn]
    assert covered((e, apart) for e in found) >= 90  # the spread between workers is in it as well
    assert np.mean([e.value for e in found]) == pytest.approx(apart, rel=0.03)
    naive = np.mean([float((g.mean(1) - g.mean((0, 1))).square().sum(1).mean()) for g in drawn])
    # averaging the minibatches first adds their noise, less what the mean over workers takes
    assert naive == pytest.approx(apart + D * 0.3**2 / 2 * 19 / 20, rel=0.03)


def test_two_halves_are_one_inner_product():
    """And of two workers, whose minibatches are independent, the product of their means."""
    x = quadratics(3, THETA, workers=3, minibatches=2)[0].numpy()
    inner = {
        (n, k): x[n, 0] @ x[n, 1] if n == k else x[n].mean(0) @ x[k].mean(0)
        for n in range(3)
        for k in range(3)
    }

    def squared(n):  # ||mu_n||^2 - 2 <mu_n, mu> + ||mu||^2
        across = sum(inner[n, k] for k in range(3)) / 3
        return inner[n, n] - 2 * across + sum(inner.values()) / 9

    gradients = torch.from_numpy(x)
    each = [squared(n) for n in range(3)]
    assert [e.value for e in estimates.worker_distances(gradients)] == pytest.approx(each)
    assert estimates.gradient_distance(gradients).value == pytest.approx(np.mean(each))
    norm = sum(inner.values()) / 9
    assert estimates.gradient_norm(gradients).value == pytest.approx(norm)


def test_the_gradients_norm_is_free_of_the_minibatches_noise():
    _, exact = quadratics(1, THETA)
    norm = float(exact.mean(0).square().sum())
    found = [
        estimates.gradient_norm(quadratics(s, THETA, minibatches=6)[0], sketched=False)
        for s in SEEDS
    ]
    assert covered((e, norm) for e in found) >= 88
    assert np.mean([e.value for e in found]) == pytest.approx(norm, rel=0.01)


def test_a_secant_is_the_curvature_along_it_and_never_above_L():
    step = torch.zeros(D, dtype=torch.float64)
    step[-1] = 2.0  # along the largest eigenvalue, 4
    found = []
    for seed in SEEDS:
        before, _ = quadratics(seed, THETA)
        after, _ = quadratics(seed + 1000, THETA + step)
        found.append(estimates.secant(before, after, 2.0, sketched=False))
    assert covered((e, 4.0) for e in found) >= 88
    assert all(e.lower for e in found)
    exact_before, exact_after = (quadratics(1, t, noise=0.0)[0] for t in (THETA, THETA * 0.3))
    distance = float((THETA * 0.7).norm())
    along = estimates.secant(exact_before, exact_after, distance, sketched=False).value
    assert along == pytest.approx(float((HESSIAN @ THETA).norm() / THETA.norm()))
    assert along < 4.0


def test_power_iteration_finds_the_largest_curvature_from_below():
    theta = torch.ones(D, dtype=torch.float64, requires_grad=True)
    # its Hessian has the eigenvalue -6 beside those of HESSIAN: L is a norm, signs do not matter
    spare = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def loss():
        return theta @ HESSIAN @ theta / 2 - 3 * spare.square().sum()

    product = hessian_vector([theta, spare], loss)
    start = torch.randn(D + 1, generator=seeded(1), dtype=torch.float64)
    for steps in (1, 3, 100):
        found = largest_curvature(product, start, steps)
        assert found.value <= 6 + 1e-12
        assert found.lower
    assert found.value == pytest.approx(6, rel=1e-6)
    eigenvalues = torch.cat([HESSIAN.diagonal(), torch.tensor([6.0])])
    few = largest_curvature(product, start, 2)
    assert float((eigenvalues - few.value).abs().min()) <= few.error


def test_a_hessian_vector_product_is_the_gradients_difference():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 2))
    network = network.double()
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    parameters = [*network.parameters(), unused]
    x = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)

    def loss():
        return network(x).square().mean()

    product = hessian_vector(parameters, loss)
    v = torch.randn(sum(p.numel() for p in parameters), generator=seeded(3), dtype=torch.float64)
    exact = product(v)

    def gradient(at):
        torch.nn.utils.vector_to_parameters(at, parameters)
        return torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(
                    loss(), parameters, allow_unused=True, materialize_grads=True
                )
            ]
        )

    here = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    difference = (gradient(here + 1e-5 * v) - gradient(here - 1e-5 * v)) / 2e-5
    assert torch.allclose(exact, difference, rtol=1e-6, atol=1e-9)


def test_the_loss_of_a_linear_network_on_gaussian_data_is_within_its_interval():
    """eps = a x on N(0, lam I): F_n = sum_k w_k d ((a e^{-u})^2 lam + (a sigma - 1)^2)."""
    u, a, lam, d = kappa_minimal(3.0, 1e-2, 30), 0.4, 0.25, 16
    w, noise = loss_weights(u), -torch.expm1(-2 * u[:-1])
    each = a**2 * torch.exp(-2 * u[:-1]) * lam + (a * noise.sqrt() - 1).square()
    exact = float((w * each).sum() / w.sum())
    loss, draw = DSMLoss(u), seeded(5)
    pairs = []
    for _ in range(60):
        values = [
            float(loss(lambda x, u, _: a * x, 0.5 * torch.randn(16, d, 1, 1, generator=draw), draw))
            for _ in range(8)
        ]
        pairs.append((estimates.mean(values), exact))
    assert covered(pairs) >= 51  # of 60 at 95 %


def test_sigma_1_of_an_affine_network_is_what_autograd_says_of_single_images():
    """One time, fixed noise: minibatches of images are all that is random."""
    u = kappa_minimal(1.0, 0.5, 1)
    weight = torch.tensor(0.3, dtype=torch.float64)
    x0 = torch.randn(4000, 1, 1, 1, generator=seeded(6), dtype=torch.float64)
    eps = torch.randn(4000, 1, 1, 1, generator=seeded(7), dtype=torch.float64)
    x = diffuse(x0, eps, u[:1].expand(4000)).flatten()
    single = 2 * x * (weight * x - eps.flatten())  # the gradient of (weight x - eps)^2
    batches = single.view(10, 20, 20).mean(2)[:, :, None]  # 10 workers, 20 minibatches of 20
    found = estimates.gradient_variance(batches, sketched=False)
    assert abs(found.value - float(single.var()) / 20) <= found.error


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_sketch_is_linear_and_the_same_for_whoever_has_the_seed(seed):
    x, y = torch.randn(2, 300, generator=seeded(seed)).double()
    sketch = Sketch(seed, 64)
    both = sketch([x + 2 * y])
    assert torch.allclose(both, sketch([x]) + 2 * sketch([y]))
    assert torch.equal(both, Sketch(seed, 64)([(x + 2 * y)[:100], (x + 2 * y)[100:]]))
    assert not torch.equal(both, Sketch(seed + 1, 64)([x + 2 * y]))


def test_a_sketch_keeps_inner_products_on_average_with_the_stated_spread():
    x, y = torch.randn(2, 200, generator=seeded(1)).double()
    y += 0.5 * x
    size, draws = 32, 2000
    found = np.array([float(Sketch(s, size)([x]) @ Sketch(s, size)([y])) for s in range(draws)])
    exact = float(x @ y)
    variance = (float(x.square().sum() * y.square().sum()) + exact**2) / size
    assert abs(found.mean() - exact) < 4 * math.sqrt(variance / draws)
    assert 0.7 * variance < found.var() < 1.1 * variance


def test_sketched_estimates_are_within_intervals_that_know_of_the_sketch():
    gradients, exact = quadratics(1, THETA, workers=10, minibatches=4)
    wide = torch.zeros(10, 4, 500, dtype=torch.float64)
    wide[..., :D] = gradients
    apart = float((exact - exact.mean(0)).square().sum(1).mean())
    whole = estimates.gradient_variance(gradients, sketched=False).value
    pairs = []
    for seed in range(60):
        sketch = Sketch(seed, 64)
        small = torch.stack([torch.stack([sketch([g]) for g in worker]) for worker in wide])
        pairs += [
            (estimates.gradient_distance(small), apart),
            (estimates.gradient_variance(small), whole),
            (estimates.gradient_norm(small), float(exact.mean(0).square().sum())),
        ]
    assert covered(pairs) >= 0.9 * len(pairs)


def test_the_second_moment_is_that_of_the_images_that_networks_see():
    images = torch.randint(0, 256, (50, 3, 4, 4), generator=seeded(4), dtype=torch.uint8)
    expected = float(to_unit(images).double().square().sum((1, 2, 3)).mean())
    assert estimates.second_moment(images) == pytest.approx(expected, rel=1e-6)
    black = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert estimates.second_moment(black) == 64


def test_a_root_keeps_the_interval_and_is_never_below_0():
    found = Estimate(4.0, 2.0, lower=True).root()
    assert found.value == 2
    assert found.error == pytest.approx(2 - math.sqrt(2))
    assert found.lower
    assert Estimate(-1.0, 5.0).root() == Estimate(0.0, 2.0)


def test_one_minibatch_is_refused_and_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        estimates.gradient_variance(torch.ones(3, 1, 5))
    assert estimates.mean([1.0]) == Estimate(1.0, None)


def unequal(seed, minibatches=4, workers=6, noise=0.5, apart=0.3):
    """Workers of which one is far from the others, and noise in two directions most of all."""
    means = torch.zeros(workers, D, dtype=torch.float64)
    means[0, 0] = apart
    sizes = noise * torch.tensor([3.0, 2.0] + [0.3] * (D - 2), dtype=torch.float64)
    shape = (workers, minibatches, D)
    return means[:, None] + sizes * torch.randn(shape, generator=seeded(seed)).double(), means


@pytest.mark.parametrize(("workers", "minibatches"), [(2, 2), (2, 4), (3, 2), (10, 2), (10, 6)])
def test_the_intervals_hold_for_few_workers_and_few_minibatches(workers, minibatches):
    """With two workers both are equally far from their mean: their spread says nothing."""
    pairs = {"distance": [], "norm": [], "largest": []}
    for seed in range(150):
        gradients, means = unequal(seed, minibatches, workers)
        exact = (means - means.mean(0)).square().sum(1)
        distance = estimates.gradient_distance(gradients, sketched=False)
        each = estimates.worker_distances(gradients, sketched=False)
        norm = estimates.gradient_norm(gradients, sketched=False)
        pairs["distance"].append((distance, float(exact.mean())))
        pairs["norm"].append((norm, float(means.mean(0).square().sum())))
        pairs["largest"].append((estimates.largest(each, distance), float(exact.max())))
    for name, found in pairs.items():
        assert all(e.error is not None for e, _ in found)
        inside = sum(e.limits()[0] <= exact <= e.limits()[1] for e, exact in found)
        assert inside >= 0.9 * len(found), name


def test_the_largest_of_equal_workers_is_not_what_noise_makes_of_it():
    values, naive = [], []
    for seed in SEEDS:
        gradients, _ = unequal(seed, apart=0.0)
        each = estimates.worker_distances(gradients, sketched=False)
        distance = estimates.gradient_distance(gradients, sketched=False)
        values.append(estimates.largest(each, distance).value)
        naive.append(max(e.value for e in each))
    assert np.mean(naive) > 4 * abs(np.mean(values))


def test_the_largest_of_clearly_unequal_workers_is_the_largest():
    found = []
    for seed in SEEDS:
        gradients, means = unequal(seed, apart=20.0)
        each = estimates.worker_distances(gradients, sketched=False)
        found.append(
            estimates.largest(each, estimates.gradient_distance(gradients, sketched=False)).value
        )
    exact = float((means - means.mean(0)).square().sum(1).max())
    assert np.mean(found) == pytest.approx(exact, rel=0.02)


def test_sketching_widens_an_interval_by_its_share_of_the_value():
    gradients, _ = unequal(1, apart=20.0)
    plain = estimates.gradient_distance(gradients, sketched=False)
    sketched = estimates.gradient_distance(gradients)
    extra = 1.96 * math.sqrt(2 / D) * plain.value
    assert sketched.error == pytest.approx(math.hypot(plain.error, extra))


def test_pooling_averages_the_squares_and_their_errors():
    found = estimates.pooled([Estimate(4.0, 3.0), Estimate(-2.0, 4.0)])
    assert found == Estimate(1.0, 2.5)
    assert estimates.pooled([Estimate(4.0, 3.0), Estimate(1.0, None)]) == Estimate(2.5, None)


def test_the_error_of_one_sketch_does_not_average_out_over_rounds():
    """Noise in one direction v, in every round: its square is ||Sv||^2, never ||v||^2."""
    inside = np.zeros(2, int)
    for seed in range(60):
        sketch, draw = Sketch(seed, 64), np.random.default_rng(seed)
        v = torch.from_numpy(draw.standard_normal(500)).float()
        exact = float(v.square().sum())
        rounds = []
        for _ in range(40):
            noise = torch.from_numpy(draw.standard_normal((4, 16, 1)))
            rounds.append(estimates.gradient_variance(noise * sketch([v])))
        with_it, without = estimates.pooled(rounds, 64), estimates.pooled(rounds)
        inside += np.array([covers(with_it, exact), covers(without, exact)])
    assert inside[0] >= 52
    assert inside[1] <= 40


def covers(found, exact):
    low, high = found.limits()
    return low <= exact <= high


def test_an_interval_with_two_sides_is_kept_through_the_root():
    found = Estimate.between(-1.0, 4.0, 9.0, lower=True).root()
    assert found.limits() == (0.0, 3.0)
    assert found == Estimate(2.0, 2.0, lower=True)
    assert found.scaled(2.0).limits() == (0.0, 6.0)
    assert Estimate(1.0).limits() is None


def test_means_share_the_spread_of_their_values():
    found = estimates.shared_spread([2.0, 6.0], [2.0, 3.0], [2, 3])
    shared = (2.0 * 1 + 3.0 * 2) / 3
    t = 3.182446  # of 3 degrees of freedom: five values, two means
    assert [e.value for e in found] == [2.0, 6.0]
    assert [e.error for e in found] == [pytest.approx(t * math.sqrt(shared / n)) for n in (2, 3)]


@pytest.mark.parametrize(("workers", "minibatches"), [(2, 2), (4, 2), (10, 2), (4, 8)])
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_the_interval_of_the_largest_mean_covers_it_with_few_values_too(
    workers, minibatches, apart
):
    """A normal value in the place of Student's t covered 0.83 of equal workers, not 0.95."""
    draw = np.random.default_rng(workers)
    means = 1 + apart * np.arange(workers) / workers
    inside = 0
    for _ in range(1000):
        values = means[:, None] + 0.05 * draw.standard_normal((workers, minibatches))
        low, high = estimates.largest_mean(values.tolist()).limits()
        inside += low <= means.max() <= high
    assert inside >= 930  # 0.95 less three standard errors
