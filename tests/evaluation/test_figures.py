"""Intervals around the figures, against repeated draws and independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fed_diffusion.evaluation.figures import (
    HOW,
    fid_interval,
    figures,
    frechet_distance,
    kid_interval,
    wilson,
)

D = 6


def draw(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + shift


def kid_of(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / D + 1) ** 3

    def mean_of_pairs(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(
        mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()
    )


def test_the_interval_of_fid_is_as_wide_as_repeated_draws_of_the_images_say() -> None:
    real, widths, found = draw(2000, 0), [], []
    for seed in range(1, 31):
        generated = draw(300, seed, shift=0.2)
        fid = frechet_distance(generated, real)
        interval = fid_interval(fid, generated, real, seed)
        assert interval is not None
        widths.append(interval[1] - interval[0])
        found.append(fid)
    expected = 2 * float(scipy.stats.t.ppf(0.975, 9)) * np.std(found, ddof=1)
    assert 0.7 * expected < np.mean(widths) < 1.5 * expected


def test_the_interval_of_kid_covers_its_expectation_as_often_as_it_says() -> None:
    truth = np.mean([kid_of(draw(2000, s, 0.3), draw(2000, -s, 0.0)) for s in range(1, 6)])
    covered = 0
    for seed in range(40):
        generated, real = draw(200, 2 * seed + 100, 0.3), draw(300, 2 * seed + 101)
        interval = kid_interval(kid_of(generated, real), generated, real, seed)
        assert interval is not None
        covered += interval[0] < truth < interval[1]
    assert covered >= 34  # 38 expected


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (998, 1000), (1000, 1000)])
def test_shares_have_wilsons_interval(hits: int, n: int) -> None:
    expected = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits / n, n) == pytest.approx([expected.low, expected.high], abs=1e-9)


def test_the_interval_of_the_score_is_students_over_its_splits() -> None:
    found = figures(draw(200, 1), draw(200, 2), draw(200, 3), 0, torch.device("cpu"))
    mean, std = found["inception_score"]
    reach = scipy.stats.t.ppf(0.975, 9) * std / 3  # std divides by 10, the error of a mean by 9
    assert found["intervals"]["inception_score"] == pytest.approx([mean - reach, mean + reach])
    assert found["intervals"]["how"] == HOW


def test_every_figure_lies_in_its_interval() -> None:
    found = figures(draw(90, 1), draw(90, 2), draw(70, 3), 0, torch.device("cpu"))
    for name in ("fid", "kid", "precision", "recall"):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high


def test_too_few_images_have_figures_without_intervals() -> None:
    found = figures(draw(2, 1), draw(2, 2), draw(9, 3), 0, torch.device("cpu"))
    assert np.isfinite(found["fid"])
    assert found["intervals"]["fid"] is found["intervals"]["kid"] is None
    assert found["precision"] is found["intervals"]["recall"] is None
