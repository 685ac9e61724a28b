"""Intervals around the figures: how often they cover, and independent formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fed_diffusion.evaluation.figures import (
    HOW,
    _groups,
    fid_interval,
    figures,
    frechet_distance,
    kid_interval,
    recall_interval,
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


REPEATS = 200
GENERATED, REAL, SHIFT = 100, 150, 0.3
NEW = 10**6
"""Seeds from here on are of draws that no interval has seen."""


def logits_of(x: Tensor) -> Tensor:
    return 3 * x[:, :4]


@pytest.fixture(scope="module")
def intervals() -> list[dict[str, Any]]:
    """The intervals of repeated draws of the generated images against one reference."""
    real, found = draw(REAL, 0), []
    for seed in range(1, REPEATS + 1):
        x = draw(GENERATED, seed, SHIFT)
        found.append(figures(x, logits_of(x), real, seed, torch.device("cpu"))["intervals"])
    return found


def coverage(intervals: list[list[float]], truth: float) -> float:
    low, high = np.array(intervals).T
    return float(((low <= truth) & (truth <= high)).mean())


def expected_fid() -> float:
    real = draw(REAL, 0)
    new = (draw(GENERATED, NEW + seed, SHIFT) for seed in range(5 * REPEATS))
    return float(np.mean([frechet_distance(x, real) for x in new]))


def expected_score() -> float:
    """The mean over many more splits, each of as many images as one of the ten has."""
    many = logits_of(draw(10_000 * GENERATED // 10, NEW, SHIFT))
    return float(isc_features_to_metric(many, splits=10_000)["inception_score_mean"])


def expected_precision() -> float:
    real, new = draw(REAL, 0), draw(50_000, NEW, SHIFT)
    radii = torch.cdist(real, real).sort().values[:, 3]
    return float((torch.cdist(new, real) <= radii).any(1).double().mean())


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ("fid", expected_fid),
        ("inception_score", expected_score),
        ("precision", expected_precision),
    ],
)
def test_an_interval_covers_the_expectation_at_its_number_of_images_as_often_as_it_says(
    intervals: list[dict[str, Any]], figure: str, expected: Callable[[], float]
) -> None:
    assert 0.90 < coverage([found[figure] for found in intervals], expected()) < 0.99


def test_the_interval_of_recall_covers_its_expectation_as_often_as_it_says() -> None:
    intervals, found = [], []
    for seed in range(3 * REPEATS):
        x, y = draw(GENERATED, NEW + seed, SHIFT), draw(REAL, 2 * NEW + seed)
        recall = neighbours(x, y)["recall"]
        found.append(recall)
        if seed < REPEATS:
            intervals.append(recall_interval(recall, x, y, seed))
    assert 0.90 < coverage(intervals, float(np.mean(found))) < 0.995
    assert np.mean(np.diff(intervals)) < 1.6 * 2 * 1.96 * np.std(found)


def neighbours(x: Tensor, y: Tensor) -> dict[str, float]:
    found: dict[str, float] = prc_features_to_metric(
        x, y, prc_neighborhood=3, save_cpu_ram=True, verbose=False
    )
    return found


def kid_of_gaussians(shift: float) -> float:
    """MMD^2 of N(shift, I) and N(0, I) from the moments of x.y, x and y independent.

    For x and y of N(a, I): E x.y = |a|^2, E (x.y)^2 = D + 2 |a|^2 + |a|^4 and
    E (x.y)^3 = |a|^6 + 3 |a|^4 + 3 (|a|^2 (|a|^2 + D) + 2 |a|^2); for y of N(0, I) the second is
    D + |a|^2 and the others are 0.
    """
    a = D * shift**2

    def kernel(first: float, second: float, third: float) -> float:
        return third / D**3 + 3 * second / D**2 + 3 * first / D + 1

    within = kernel(a, D + 2 * a + a**2, a**3 + 3 * a**2 + 3 * (a * (a + D) + 2 * a))
    return within + kernel(0, D, 0) - 2 * kernel(0, D + a, 0)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_interval_of_kid_covers_that_of_infinitely_many_images_as_often_as_it_says(
    shift: float,
) -> None:
    intervals, found = [], []
    for seed in range(REPEATS):
        generated, real = draw(200, 2 * seed, shift), draw(300, 2 * seed + 1)
        kid = kid_of(generated, real)
        interval = kid_interval(kid, 0.0, generated, real, seed)
        assert interval is not None
        intervals.append(interval)
        found.append(kid)
    assert 0.90 < coverage(intervals, kid_of_gaussians(shift)) < 0.995
    width = float(np.mean(np.diff(intervals)))
    # where both are alike, the estimate is quadratic in what a jackknife takes for linear
    assert width < (2.2 if shift == 0 else 1.4) * 2 * 1.96 * np.std(found)


def jackknife(found: list[float]) -> tuple[float, int]:
    g = len(found)
    return (g - 1) / g * sum((f - sum(found) / g) ** 2 for f in found), g - 1


def test_the_interval_of_kid_is_that_of_kids_computed_without_each_group() -> None:
    x, y = draw(43, 1, 0.3), draw(52, 2)
    kept_x = [drop(43, group) for group in _groups(43, 5, 2)]
    kept_y = [drop(52, group) for group in _groups(52, 5, 2, 1)]
    v, f = jackknife([kid_of(x[kept], y) for kept in kept_x])
    w, _ = jackknife([kid_of(x, y[kept]) for kept in kept_y])
    s, h = 0.02**2, 99
    freedom = (v + w + s) ** 2 / (v**2 / f + w**2 / f + s**2 / h)
    reach = scipy.stats.t.ppf(0.975, freedom) * (v + w + s) ** 0.5
    found = kid_interval(0.5, 0.02, x, y, seed=5)
    assert found == pytest.approx([0.5 - reach, 0.5 + reach], rel=1e-4)


def drop(n: int, group: Tensor) -> list[int]:
    return sorted(set(range(n)) - set(group.tolist()))


def test_the_interval_of_recall_is_that_of_recalls_computed_without_each_group() -> None:
    x, y = draw(61, 1, 0.3), draw(50, 2)
    recalls = [neighbours(x[drop(61, group)], y)["recall"] for group in _groups(61, 5, 4)]
    variance, freedom = jackknife(recalls)
    reach = scipy.stats.t.ppf(0.975, freedom) * variance**0.5
    recall = neighbours(x, y)["recall"]
    low, high = scipy.stats.binomtest(round(50 * recall), 50).proportion_ci(method="wilson")
    expected = [min(recall - reach, low), min(1.0, max(recall + reach, high))]
    assert recall_interval(recall, x, y, seed=5) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [9.0, 0.0])
def test_a_recall_of_none_or_all_of_the_real_images_is_not_taken_for_certain(shift: float) -> None:
    x, y = 3 * draw(150, 1) + shift, draw(40, 2)
    recall = neighbours(x, y)["recall"]
    assert recall == (0 if shift else 1)
    low, high = scipy.stats.binomtest(round(40 * recall), 40).proportion_ci(method="wilson")
    assert recall_interval(recall, x, y, seed=0) == pytest.approx([low, high])


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


@pytest.mark.parametrize("n", [2, 5])
def test_too_few_images_have_figures_without_intervals(n: int) -> None:
    found = figures(draw(n, 1), draw(n, 2), draw(9, 3), 0, torch.device("cpu"))
    assert np.isfinite([found["fid"], found["kid"], *found["inception_score"]]).all()
    for figure in ("fid", "kid", "inception_score", "recall"):
        assert found["intervals"][figure] is None
    assert (found["precision"] is None) == (n == 2)


def test_the_score_of_few_images_is_over_splits_of_two_or_more() -> None:
    certain = 50 * torch.eye(3)[torch.arange(12) % 3]  # each image is sure of its class
    found = figures(draw(12, 1), certain, draw(20, 3), 0, torch.device("cpu"))
    # a split of two images of one class has the score 1, of two classes 2
    assert found["inception_score"][0] > 1.2
    found = figures(draw(3, 1), certain[:3], draw(20, 3), 0, torch.device("cpu"))
    assert found["inception_score"] == pytest.approx([3, 0])


def test_a_classifier_that_is_certain_beyond_float64_has_a_score() -> None:
    certain = 1e4 * torch.eye(4)[torch.arange(400) % 4]
    found = figures(draw(400, 1), certain, draw(20, 3), 0, torch.device("cpu"))
    mild = figures(draw(400, 1), certain / 100, draw(20, 3), 0, torch.device("cpu"))
    assert found["inception_score"] == pytest.approx(mild["inception_score"])
    assert 3.5 < found["inception_score"][0] <= 4


def test_equal_images_have_figures_and_intervals_around_them() -> None:
    equal, real = draw(1, 1).repeat(60, 1), draw(70, 2)
    for generated, reference in ((equal, real), (real, equal), (real, real)):
        found = figures(generated, logits_of(generated), reference, 0, torch.device("cpu"))
        for figure in ("fid", "kid", "precision", "recall"):
            low, high = found["intervals"][figure]
            assert low <= found[figure] <= high
        assert found["intervals"]["inception_score"][0] <= found["inception_score"][0]
        assert found["fid"] >= 0
