"""Counted noise levels as times."""

import math

import pytest
import torch

from fed_diffusion.diffusion.levels import level_of, times_of
from fed_diffusion.diffusion.process import alpha, sigma

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)


def test_level_j_has_the_signal_and_the_noise_of_alpha_bar_j():
    u = times_of(ALPHA_BAR)
    torch.testing.assert_close(alpha(u), ALPHA_BAR.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma(u), (1 - ALPHA_BAR).sqrt(), rtol=1e-9, atol=0)


def test_the_level_of_time_u_j_is_exactly_j():
    u = times_of(ALPHA_BAR)
    assert torch.equal(level_of(u, u), torch.arange(1000, dtype=torch.float64))


def test_between_two_levels_it_is_linear_in_the_log_ratio_of_noise_to_signal():
    u = times_of(ALPHA_BAR)
    ratios = [0.5 * math.log((1 - bar) / bar) for bar in ALPHA_BAR[[400, 401]].tolist()]
    ratio = 0.25 * ratios[0] + 0.75 * ratios[1]  # sigma / alpha = e^ratio, alpha^2 + sigma^2 = 1
    between = torch.tensor([0.5 * math.log1p(math.exp(2 * ratio))], dtype=torch.float64)
    torch.testing.assert_close(level_of(between, u).item(), 400.75, rtol=1e-10, atol=0)


def test_a_last_level_without_signal_is_left_out():
    bar = torch.cat([ALPHA_BAR[:5], torch.zeros(1, dtype=torch.float64)])
    assert len(times_of(bar)) == 5


@pytest.mark.parametrize("bar", [[0.9], [0.9, 0.9], [0.5, 0.9], [1.0, 0.5], [0.9, -0.1], [2.0]])
def test_levels_whose_signal_does_not_fall_are_refused(bar):
    with pytest.raises(ValueError, match="alpha_bar"):
        times_of(torch.tensor(bar))
