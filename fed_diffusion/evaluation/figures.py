"""Figures of merit as functions of features alone, each with a 95 % interval.

FID, KID, precision and recall compare the features of generated images, [n, d], with those of a
reference set, [m, d]; the Inception Score reads class logits. FID and the score are biased by n,
so figures compare at one number of images only, and no interval covers that bias.
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

from fed_diffusion.rng import Purpose, generator

FLOOR_SPLITS = 10
GROUPS = 10
LEVEL = 0.95
NEIGHBOURS = 3
"""Precision and recall: the radius around an image reaches its third neighbour."""
HOW = (
    "95 %; fid: jackknife over 10 groups of the generated images, the reference held fixed; kid: t "
    "over 10 disjoint pairs of groups; inception_score: t over its 10 splits; precision, recall: "
    "Wilson's, of a share of the generated and of the real images. The bias of fid and "
    "inception_score by the number of images is in none of them."
)

_Interval = list[float] | None


def figures(
    generated: Tensor, logits: Tensor, real: Tensor, seed: int, device: torch.device
) -> dict[str, Any]:
    """torch-fidelity's FID, KID, Inception Score, precision and recall, and their intervals.

    Parameters
    ----------
    generated, real
        Features, [n, d] and [m, d].
    logits
        Of the generated images, [n, classes].
    seed
        Of the groups behind the intervals.
    device
        Where distances between all pairs of images are computed.
    """
    n, m = len(generated), len(real)
    fid = fid_statistics_to_metric(
        fid_features_to_statistics(generated), fid_features_to_statistics(real), False
    )["frechet_inception_distance"]
    # the default of 1000 fails on smaller sets; KID is unbiased at any subset size
    subset = max(2, min(1000, n // 2, m // 2))
    kid = kid_features_to_metric(generated, real, kid_subset_size=subset, verbose=False)[
        "kernel_inception_distance_mean"
    ]
    # of fewer images than splits some splits would be empty
    splits = min(10, n)
    isc = isc_features_to_metric(logits, splits=splits)
    score, spread = isc["inception_score_mean"], isc["inception_score_std"]
    precision = recall = None
    if min(n, m) > NEIGHBOURS:
        prc = prc_features_to_metric(
            generated.to(device),
            real.to(device),
            prc_neighborhood=NEIGHBOURS,
            save_cpu_ram=True,
            verbose=False,
        )
        precision, recall = prc["precision"], prc["recall"]
    error = spread / math.sqrt(splits - 1)  # torch-fidelity divides by the number of splits
    return {
        "fid": fid,
        "inception_score": [score, spread],
        "kid": kid,
        "precision": precision,
        "recall": recall,
        "intervals": {
            "fid": fid_interval(fid, generated, real, seed),
            "inception_score": _t_interval(score, error, splits),
            "kid": kid_interval(kid, generated, real, seed),
            "precision": None if precision is None else wilson(precision, n),
            "recall": None if recall is None else wilson(recall, m),
            "how": HOW,
        },
    }


def fid_interval(fid: float, generated: Tensor, real: Tensor, seed: int) -> _Interval:
    """fid -+ t SE of a delete-a-group jackknife; None of fewer than four images.

    With FID_(j) of all generated images but those of group j of g:
    SE^2 = (g - 1) / g sum_j (FID_(j) - mean_j FID_(j))^2. Leaving out a tenth shifts all FID_(j)
    up by much the same bias, which the difference takes away; FIDs of the groups themselves would
    be biased several times as much as the figure they are to qualify.
    """
    groups = _groups(len(generated), seed, min(GROUPS, len(generated) // 2))
    if len(groups) < 2:
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
    error = math.sqrt(len(groups) - 1) * float(torch.tensor(without).double().std(correction=0))
    interval = _t_interval(fid, error, len(groups))
    return interval and [max(0.0, interval[0]), interval[1]]


def kid_interval(kid: float, generated: Tensor, real: Tensor, seed: int) -> _Interval:
    """kid -+ t SE of the KIDs of disjoint pairs of groups, at most 1000 images each.

    KID is unbiased at any size, so small groups will do; those of disjoint images are
    independent, where the usual 100 subsets overlap and their spread says little.
    """
    count = min(GROUPS, len(generated) // 2, len(real) // 2)
    ours, theirs = _groups(len(generated), seed, count), _groups(len(real), seed, count, 1)
    if count < 2:
        return None
    size = min(1000, min(map(len, ours)), min(map(len, theirs)))
    found = torch.tensor(
        [
            _mmd2(generated[a[:size]].double(), real[b[:size]].double())
            for a, b in zip(ours, theirs, strict=True)
        ]
    )
    return _t_interval(kid, float(found.std()) / math.sqrt(count), count)


def _mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD of [g, d] and [g, d] under the kernel (x.y / d + 1)^3."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def between_others(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(between_others(x) + between_others(y) - 2 * kernel(x, y).mean())


def wilson(share: float, n: int) -> list[float]:
    """Wilson's score interval of a share of n independent trials."""
    z2 = float(special.ndtri((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def _t_interval(middle: float, error: float, groups: int) -> _Interval:
    if groups < 2:
        return None
    reach = float(special.stdtrit(groups - 1, (1 + LEVEL) / 2)) * error
    return [middle - reach, middle + reach]


def _groups(n: int, seed: int, count: int, which: int = 0) -> Sequence[Tensor]:
    """0..n-1 in random groups of equal size but for one; images come sorted by class."""
    if count < 1:
        return ()
    order = generator(seed, Purpose.EVALUATION, client=2 + FLOOR_SPLITS + which).permutation(n)
    return torch.from_numpy(order).tensor_split(count)


def fid_floor(features: Tensor, side: int, seed: int) -> float:
    """What real images score against real images: the mean FID over 10 random splits.

    Parameters
    ----------
    features
        Of the reference set, [m, d].
    side
        Images on each side of a split, at most m // 2.
    """
    total = 0.0
    for split in range(FLOOR_SPLITS):
        order = generator(seed, Purpose.EVALUATION, client=2 + split).permutation(len(features))
        total += frechet_distance(features[order[:side]], features[order[side : 2 * side]])
    return total / FLOOR_SPLITS


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of features [n, d] and [m, d], in float64.

    torch-fidelity's `fid_statistics_to_metric` takes the eigenvalues of a non-symmetric d x d
    matrix, 14 to 33 s for one of Inception's 2048 on two cores, and the floor needs ten. With
    S_a = A^T A and S_b = B^T B, tr sqrt(S_a S_b) is the sum of the singular values of A B^T.
    """
    mean_a, rows_a = _centred(a)
    mean_b, rows_b = _centred(b)
    return _distance(mean_a - mean_b, rows_a, rows_b)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] of features [n, d], and A [n, d] with A^T A their covariance; float64."""
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean) / math.sqrt(len(x) - 1)


def _triangle(rows: Tensor) -> Tensor:
    """Rows of the same covariance, at most d of them."""
    return torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows


def _distance(apart: Tensor, a: Tensor, b: Tensor) -> float:
    """The Frechet distance of Gaussians with covariances a^T a and b^T b."""
    cross = _triangle(a) @ b.T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * overlap)
