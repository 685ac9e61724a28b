"""The denoising loss as an estimator of F_n (5)."""

import math

import numpy as np
import pytest
import torch

from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import kappa_minimal
from fed_diffusion.diffusion.process import diffuse

U = kappa_minimal(3.0, 1e-2, 40)


def linear_network(a, b):
    """eps(x, u) = a x + b e^{-u}: its exact expected loss is known for Gaussian noise."""

    def network(x, u, labels):
        return a * x + b * torch.exp(-u).to(x.dtype).reshape(-1, 1, 1, 1)

    return network


def full_sum(x0, a, b):
    """F_n by the definition (5): sum over k, expectation over eps in closed form."""
    total = 0.0
    u = U.numpy()
    for k in range(len(u) - 1):
        var = 1 - math.exp(-2 * u[k])
        decay = math.exp(-u[k])
        # a (decay x0 + s eps) + b decay - eps has mean decay (a x0 + b) and eps factor a s - 1
        per_image = ((decay * (a * x0 + b)) ** 2).sum(axis=(1, 2, 3))
        noise = x0[0].size * (a * math.sqrt(var) - 1) ** 2
        total += (u[k] - u[k + 1]) / var * (per_image.mean() + noise)
    return total


def test_the_simple_loss_times_Z_d_is_unbiased_for_the_full_sum():
    x0 = torch.linspace(-1, 1, 64 * 4).reshape(64, 1, 2, 2)
    loss, generator = DSMLoss(U), torch.Generator().manual_seed(1)
    draws = np.array([float(loss(linear_network(0.4, 0.2), x0, generator)) for _ in range(4000)])
    estimate = draws.mean() * loss.Z * 4
    error = draws.std() / math.sqrt(len(draws)) * loss.Z * 4
    expected = full_sum(x0.numpy().astype(np.float64), 0.4, 0.2)
    assert abs(estimate - expected) < 4 * error
    assert error < 0.01 * expected


def test_each_stratum_gets_exactly_one_time():
    loss, generator = DSMLoss(U), torch.Generator().manual_seed(2)
    weights = ((U[:-1] - U[1:]) / (1 - torch.exp(-2 * U[:-1]))).numpy()
    cdf = np.concatenate([[0], np.cumsum(weights) / weights.sum()])
    n = 16
    times = loss.draw_times(n, generator).sort(descending=True).values.numpy()
    index = np.array([np.argmin(abs(U.numpy() - t)) for t in times])
    for i, k in enumerate(index):  # the k-th interval of the distribution overlaps stratum i
        assert cdf[k] < (i + 1) / n
        assert cdf[k + 1] > i / n


def test_times_follow_the_papers_weights():
    loss, generator = DSMLoss(U), torch.Generator().manual_seed(3)
    n = 200_000
    times = loss.draw_times(n, generator)
    counts = np.array([(times == u).sum().item() for u in U[:-1]])
    weights = ((U[:-1] - U[1:]) / (1 - torch.exp(-2 * U[:-1]))).numpy()
    np.testing.assert_allclose(counts / n, weights / weights.sum(), atol=2 / n)


def test_the_time_of_an_image_does_not_depend_on_its_place_in_the_batch():
    loss, generator = DSMLoss(U), torch.Generator().manual_seed(4)
    first = torch.stack([loss.draw_times(8, generator) for _ in range(4000)])
    spread = first.mean(0)
    assert float(spread.max() - spread.min()) < 0.12  # each is a mean of 4000 draws


@pytest.mark.parametrize("u", [1e-6, 0.1, 4.0])
def test_diffusion_keeps_unit_variance(u):
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    x = diffuse(x0, eps, torch.tensor([u], dtype=torch.float64))
    assert float(x) == pytest.approx(
        math.exp(-u) * 2 + math.sqrt(1 - math.exp(-2 * u)) * 3, rel=1e-5
    )
