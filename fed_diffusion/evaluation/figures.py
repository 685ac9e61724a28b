"""Figures of merit as functions of features alone, each with a 95 % interval.

FID, KID, precision and recall compare the features of generated images, [n, d], with those of a
reference set, [m, d]; the Inception Score reads class logits. All but KID are biased by the numbers
of images, so figures compare at one number of images only, and their intervals are about the
figure's expectation at that number: no interval covers that bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy import special
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.evaluation.pairs import kernel_sums, kernel_sums_within, recalls_without

FLOOR_SPLITS = 10
GROUPS, FEWEST_GROUPS = 10, 3
"""The number of groups behind an interval, and the fewest of them.

Over two groups, the interval of recall covered only 0.81 to 0.86.
"""
SUBSETS = 100
"""The number of random subsets, of at most 1000 images, whose mean KID is the figure."""
LEVEL = 0.95
LEAST_LOGIT = -700.0
"""How far below the largest logit one may lie: float64 has exp(-700), but not exp(-750)."""
NEIGHBOURS = 3
"""For precision and recall, the radius around an image reaches its third neighbour."""
HOW = (
    "95 %; fid: jackknife over 10 groups of the generated images, the reference held fixed; kid: "
    "jackknife over 10 groups of the generated and 10 of the real images, and the spread of its "
    "subsets; inception_score: t over its 10 splits; precision: Wilson's, of a share of the "
    "generated images, the reference held fixed; recall: jackknife over 10 groups of the generated "
    "images, widened to Wilson's of a share of the real images. kid's is about the value of "
    "infinitely many images. The others' are about the figure's expectation at this number of "
    "images: its bias by that number is in none of them."
)

_Interval = list[float] | None


def figures(
    generated: Tensor, logits: Tensor, real: Tensor, seed: int, device: torch.device
) -> dict[str, Any]:
    """Return torch-fidelity's FID, KID, Inception Score, precision and recall, with intervals.

    Parameters
    ----------
    generated, real
        Features, [n, d] and [m, d].
    logits
        Logits of the generated images, [n, classes].
    seed
        The seed of the groups behind the intervals.
    device
        Where distances between all pairs of images are computed.
    """
    n, m = len(generated), len(real)
    found = fid_statistics_to_metric(
        fid_features_to_statistics(generated), fid_features_to_statistics(real), False
    )["frechet_inception_distance"]
    fid = max(found, 0.0)  # that of a set to itself may be rounded to below 0
    # the default of 1000 fails on smaller sets; KID is unbiased at any subset size
    subset = max(2, min(1000, n // 2, m // 2))
    subsets = kid_features_to_metric(
        generated, real, kid_subsets=SUBSETS, kid_subset_size=subset, verbose=False
    )
    kid = subsets["kernel_inception_distance_mean"]
    by_subset = subsets["kernel_inception_distance_std"] / math.sqrt(SUBSETS - 1)
    # the score of a split of one image is 1 whatever the image
    splits = max(1, min(10, n // 2))
    isc = isc_features_to_metric(_without_zeros(logits), splits=splits)
    score, spread = isc["inception_score_mean"], isc["inception_score_std"]
    intervals: dict[str, Any] = {
        "fid": fid_interval(fid, generated, real, seed),
        "inception_score": score_interval(score, spread, splits),
        "precision": None,
        "recall": None,
        "how": HOW,
    }
    generated, real = generated.to(device), real.to(device)
    intervals["kid"] = kid_interval(kid, by_subset, generated, real, seed)
    precision = recall = None
    if min(n, m) > NEIGHBOURS:
        prc = prc_features_to_metric(
            generated, real, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        precision, recall = prc["precision"], prc["recall"]
        intervals["precision"] = wilson(precision, n)
        intervals["recall"] = recall_interval(recall, generated, real, seed)
    return {
        "fid": fid,
        "inception_score": [score, spread],
        "kid": kid,
        "precision": precision,
        "recall": recall,
        "intervals": intervals,
    }


def _without_zeros(logits: Tensor) -> Tensor:
    """Return logits of the same probabilities, none rounded to 0: the score would be NaN."""
    logits = logits.double()
    return (logits - logits.amax(1, keepdim=True)).clamp(min=LEAST_LOGIT)


def fid_interval(fid: float, generated: Tensor, real: Tensor, seed: int) -> _Interval:
    """Return fid -+ t SE of a jackknife over the generated images; None below six images.

    Leaving out a tenth shifts all values by much the same bias, which their differences do not
    see; FIDs of the groups themselves would be biased several times as much as the figure they are
    to qualify.
    """
    groups = _groups(len(generated), seed, fewest=2)
    if len(groups) < FEWEST_GROUPS:
        return None
    mean, rows = _centred(real)
    rows = _triangle(rows)
    kept = torch.ones(len(generated), dtype=torch.bool)
    without = []
    for group in groups:
        kept[group] = False
        own_mean, own = _centred(generated[kept])
        without.append(_distance(own_mean - mean, own, rows))
        kept[group] = True
    low, high = _t_interval(fid, [_jackknife(torch.tensor(without))])
    return [max(0.0, low), high]


def kid_interval(
    kid: float, by_subset: float, generated: Tensor, real: Tensor, seed: int
) -> _Interval:
    """Return kid -+ t SE of a jackknife over both sets; None where one has fewer than six images.

    A mean over random subsets has the same expectation, given the images, as the unbiased estimate
    from all pairs of them, and `by_subset` is its standard error around that.
    """
    ours, theirs = (_groups(len(x), seed, 2, which) for which, x in enumerate((generated, real)))
    if min(len(ours), len(theirs)) < FEWEST_GROUPS:
        return None
    x, y = [generated[group] for group in ours], [real[group] for group in theirs]
    between = kernel_sums(x, y)
    variances = [
        _jackknife(_mmd2_without(x, between, len(real))),
        _jackknife(_mmd2_without(y, between.T, len(generated))),
        (by_subset**2, SUBSETS - 1),
    ]
    return _t_interval(kid, variances)


def _mmd2_without(groups: list[Tensor], between: Tensor, others: int) -> Tensor:
    """Return the unbiased MMD^2 without each group of a set, less the other set's term: [groups].

    Parameters
    ----------
    between
        `kernel_sums` of the groups and those of the other set.
    others
        Images in the other set.
    """
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    left = sizes.sum() - sizes
    within = kernel_sums_within(groups)
    own = within.sum() - 2 * within.sum(1) + within.diagonal()
    return own / (left * (left - 1)) - 2 * (between.sum() - between.sum(1)) / (left * others)


def recall_interval(recall: float, generated: Tensor, real: Tensor, seed: int) -> _Interval:
    """Return recall -+ t SE of a jackknife over the generated images, or Wilson's if that is wider.

    Wilson's interval alone takes each real image for a trial, but one generated image recalls
    several of them, and which ones depends on the others. The jackknife alone has no width where no
    real image is recalled, or each one. None of fewer than twelve generated images.
    """
    groups = _groups(len(generated), seed, fewest=NEIGHBOURS + 1)
    if len(groups) < FEWEST_GROUPS:
        return None
    without = recalls_without([generated[group] for group in groups], real, NEIGHBOURS)
    low, high = _t_interval(recall, [_jackknife(without)])
    least, most = wilson(recall, len(real))
    return [max(0.0, min(low, least)), min(1.0, max(high, most))]


def score_interval(score: float, spread: float, splits: int) -> _Interval:
    """Return Student's interval of the mean over disjoint splits; None for fewer than three."""
    if splits < FEWEST_GROUPS:
        return None
    # torch-fidelity's spread divides by the number of splits
    low, high = _t_interval(score, [(spread**2 / (splits - 1), splits - 1)])
    return [max(1.0, low), high]


def wilson(share: float, n: int) -> list[float]:
    """Return Wilson's score interval of a share of n independent trials."""
    z2 = float(special.ndtri((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # an end that is the share itself, 0 or 1, may be rounded to the wrong side of it
    return [max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))]


def _jackknife(without: Tensor) -> tuple[float, int]:
    """Return a figure's variance from its values without each group, and its degrees of freedom.

    With F_(j) of all images but those of group j of g, the variance is (g - 1) / g sum_j (F_(j) -
    mean_i F_(i))^2.
    """
    freedom = len(without) - 1
    return freedom * float(without.double().var(correction=0)), freedom


def _t_interval(middle: float, variances: Sequence[tuple[float, int]]) -> list[float]:
    """Return middle -+ t SE; SE^2 is a sum of independent estimates (variance, degrees of freedom).

    The sum's degrees of freedom are Welch's and Satterthwaite's.
    """
    total = sum(variance for variance, _ in variances)
    squares = sum(variance**2 / freedom for variance, freedom in variances)
    freedom = total**2 / squares if squares > 0 else 1.0
    reach = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(total)
    return [middle - reach, middle + reach]


def _groups(n: int, seed: int, fewest: int, which: int = 0) -> Sequence[Tensor]:
    """Return 0..n-1 in at most 10 random groups of `fewest` or more, equal in size but for one.

    The groups are random because images come sorted by class.
    """
    order = generator(seed, Purpose.EVALUATION, client=2 + FLOOR_SPLITS + which).permutation(n)
    return torch.from_numpy(order).tensor_split(max(1, min(GROUPS, n // fewest)))


def fid_floor(features: Tensor, side: int, seed: int) -> float:
    """Return how real images score against real ones: the mean FID over 10 random splits.

    Parameters
    ----------
    features
        Features of the reference set, [m, d].
    side
        Images on each side of a split, at most m // 2.
    """
    total = 0.0
    for split in range(FLOOR_SPLITS):
        order = generator(seed, Purpose.EVALUATION, client=2 + split).permutation(len(features))
        total += frechet_distance(features[order[:side]], features[order[side : 2 * side]])
    return total / FLOOR_SPLITS


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the FID of features [n, d] and [m, d], in float64.

    torch-fidelity's `fid_statistics_to_metric` takes the eigenvalues of a non-symmetric d x d
    matrix, 14 to 33 s for one of Inception's 2048 on two cores, and the floor needs ten. With S_a =
    A^T A and S_b = B^T B, tr sqrt(S_a S_b) is the sum of the singular values of A B^T.
    """
    mean_a, rows_a = _centred(a)
    mean_b, rows_b = _centred(b)
    return _distance(mean_a - mean_b, rows_a, rows_b)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] of features [n, d], and A [n, d] with A^T A their covariance; float64."""
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean) / math.sqrt(len(x) - 1)


def _triangle(rows: Tensor) -> Tensor:
    """Return rows of the same covariance, at most d of them."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def _distance(apart: Tensor, a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians with covariances a^T a and b^T b."""
    cross = _triangle(a) @ b.T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * overlap)
