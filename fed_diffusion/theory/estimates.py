"""What Theorem 4.11 reads of a run, measured: each with its estimator, its cost and its error.

| quantity | estimator | cost | error |
|---|---|---|---|
| d | the images' shape | none | exact |
| M_{n,2} | `second_moment` | a pass over the bytes | exact |
| F_n, F | `mean` of `DSMLoss` over minibatches | a forward pass each | Student's interval |
| sigma_1^2 | `gradient_variance` | m backward passes a worker | Student's, and the sketch's |
| sigma_2^2 | `gradient_distance`, `worker_distances` | the same passes | by `Means` |
| ||grad F||^2 | `gradient_norm` | the same passes | by `Means` |
| L at theta | `curvature.curvature` | double backward passes | distance to an eigenvalue |
| L on the path | `secant` | the passes of two rounds | as ||grad F||^2 |

w^2 is `pruning_error`, Gamma_r `MaskedMean.gamma` and ||theta_R - theta_0|| `norms.difference`: all
exact. Losses and gradients are those of the simple loss F_n / (Z d), which training minimises;
`bound.to_F_scale` brings a `Training` made of them to the scale of F, in that one place.

Gradients come as m independent minibatches [m, k] of each of N workers (or all as [N, m, k]), whole
(k = D) or as a `sketch.Sketch`. An estimate that is `lower` estimates something that is at most
what the theorem asks for, such as a mean where the theorem has a largest value; its own noise may
still bring it above.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
NORMAL = 1.96
"""The number of standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes
    ----------
    value, error
        The estimate and half the width of its 95 % interval: 0 where it is exact, None where
        nothing is known of it.
    lower
        What it estimates is at most what the theorem asks for, the largest value anywhere.
    ends
        The interval where its two sides differ; `error` is the longer side.
    """

    value: float
    error: float | None = None
    lower: bool = False
    ends: tuple[float, float] | None = field(default=None, compare=False)

    @classmethod
    def between(cls, low: float, value: float, high: float, lower: bool = False) -> Estimate:
        """Return an estimate with the ends of its interval."""
        return cls(value, max(value - low, high - value), lower, (low, high))

    def limits(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval; None where there is none."""
        if self.ends is not None:
            return self.ends[0], self.ends[1]
        return None if self.error is None else (self.value - self.error, self.value + self.error)

    def root(self) -> Estimate:
        """Return the square root, 0 where noise has brought an unbiased estimate below 0."""
        low, middle, high = (
            None if end is None else math.sqrt(max(end, 0.0)) for end in self._in_order()
        )
        assert middle is not None
        if low is None or high is None:
            return Estimate(middle, None, self.lower)
        return Estimate.between(low, middle, high, self.lower)

    def _in_order(self) -> tuple[float | None, float, float | None]:
        low, high = self.limits() or (None, None)
        return low, self.value, high

    def scaled(self, by: float) -> Estimate:
        """Return the estimate of `by` times the quantity, by > 0."""
        error = None if self.error is None else self.error * by
        ends = None if self.ends is None else (self.ends[0] * by, self.ends[1] * by)
        return Estimate(self.value * by, error, self.lower, ends)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def second_moment(images: Tensor) -> float:
    """Return M_2 = E ||X_0||^2 of images [n, C, H, W] as networks see them: uint8, which are in
    [-1, 1] then (exact), or latents.
    """
    if images.is_floating_point():
        return float(images.double().square().sum()) / len(images)
    counts = torch.bincount(images.reshape(-1), minlength=256).double()
    grey = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    return float((counts * grey.square()).sum()) / len(images)


def mean(values: Sequence[float], lower: bool = False) -> Estimate:
    """Return the mean of independent values with Student's interval; none for a single value."""
    return Estimate(math.fsum(values) / len(values), _student(values), lower)


def largest_mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Return the largest mean of groups of at least two values, which vary alike about them."""
    found = [math.fsum(group) / len(group) for group in values]
    variances = [float(np.var(group, ddof=1)) for group in values]
    return largest_of(found, variances, [len(group) for group in values])


def largest_of(
    found: Sequence[float], variances: Sequence[float], counts: Sequence[int]
) -> Estimate:
    """Return the largest of the means of groups of so many values, by their shared variance."""
    each = shared_spread(found, variances, counts)
    return largest(each, mean(found), sum(counts) - len(counts))


def shared_spread(
    found: Sequence[float], variances: Sequence[float], counts: Sequence[int]
) -> list[Estimate]:
    """Return means of groups of so many values, with Student's intervals by the shared variance.

    The degrees of freedom are the number of values less the number of groups.
    """
    weights = [count - 1 for count in counts]
    shared = math.fsum(v * w for v, w in zip(variances, weights, strict=True)) / sum(weights)
    quantile = _quantile((1 - LEVEL) / 2, sum(weights))
    return [
        Estimate(value, quantile * math.sqrt(shared / count))
        for value, count in zip(found, counts, strict=True)
    ]


def gradient_variance(gradients: Sequence[Tensor] | Tensor, sketched: bool = True) -> Estimate:
    """Return sigma_1^2 at the minibatches' size: E ||g - E g||^2, the mean over workers.

    For each worker it is the sample variance, at two minibatches ||g_1 - g_2||^2 / 2; unbiased.
    """
    spread = Means(gradients).spread
    # a sum of at most m - 1 squared norms: as far off as one of them, at worst
    off = math.sqrt(2 / gradients[0].shape[1]) * float(spread.mean()) if sketched else 0.0
    return _joined(spread.tolist(), off, lower=True)


def gradient_distance(gradients: Sequence[Tensor] | Tensor, sketched: bool = True) -> Estimate:
    """Return ||grad F_n - grad F||^2, the mean over workers, without the minibatches' noise.

    It is at most sigma_2^2, which holds for every worker. It is unbiased, so that it can be below
    0.
    """
    n = len(gradients)
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    return replace(Means(gradients, sketched).form(centred @ centred.T / n), lower=True)


def worker_distances(gradients: Sequence[Tensor] | Tensor, sketched: bool = True) -> list[Estimate]:
    """Return ||grad F_n - grad F||^2 of each worker, without the minibatches' noise; unbiased."""
    n, means = len(gradients), Means(gradients, sketched)
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    return [means.form(torch.outer(row, row)) for row in centred]


def gradient_norm(gradients: Sequence[Tensor] | Tensor, sketched: bool = True) -> Estimate:
    """Return ||grad F||^2 at one theta, F the mean over workers, without the minibatches' noise.

    It is unbiased, so that it can be below 0.
    """
    n = len(gradients)
    return Means(gradients, sketched).form(torch.full((n, n), n**-2.0, dtype=torch.float64))


def secant(
    before: Sequence[Tensor] | Tensor,
    after: Sequence[Tensor] | Tensor,
    distance: float,
    sketched: bool = True,
) -> Estimate:
    """Return ||grad F(theta') - grad F(theta)|| / ||theta' - theta||, at most L, without the noise.

    Parameters
    ----------
    before, after
        Gradients of the same workers at theta and at theta'.
    distance
        ||theta' - theta||, above 0.
    """
    n = len(before)
    signs = torch.cat([torch.full((n,), sign / n, dtype=torch.float64) for sign in (-1, 1)])
    change = Means([*before, *after], sketched).form(torch.outer(signs, signs))
    return replace(change.scaled(1 / distance**2), lower=True).root()


class Means:
    """The means mu_g of G groups of vectors, of which each group has m_g noisy copies.

    It estimates quadratic forms of the means without the noise: <mu_g, mu_h> of two groups is
    <x_g, x_h> of the copies' means, and of one group the mean of <x_i, x_j> over i != j.

    The variance of such a form has two parts: of noise with noise, which two groups give by
    tr(S_g S_h), S their covariances, and of noise with the means. Two copies are too few for a
    covariance of their own, so the groups share its shape: tr(S_g S_h) is `alike` times tr S_g
    tr S_h. `alike`, one over the number of dimensions that the noise has, comes from pairs of
    groups; or, where there are four copies, from the two halves of each.

    Parameters
    ----------
    copies
        [m_g, k] of each group, m_g at least 2.
    sketched
        The vectors are sketches, which all share: squared norms are off by sqrt(2 / k) of them. The
        sketching of the noise shows in the copies like the noise.

    Attributes
    ----------
    spread
        tr S_g [G].
    """

    def __init__(self, copies: Sequence[Tensor] | Tensor, sketched: bool = True):
        groups = [group.double() for group in copies]
        if min(len(group) for group in groups) < 2:
            raise ValueError("one minibatch tells nothing of the noise; at least two are needed")
        self._off = math.sqrt(2 / groups[0].shape[1]) if sketched else 0.0
        self._counts = torch.tensor([float(len(group)) for group in groups]).double()
        self._means = torch.stack([group.mean(0) for group in groups])
        residuals = [group - group.mean(0) for group in groups]
        self.spread = torch.stack([_spread(residual) for residual in residuals])
        self._inner = self._means @ self._means.T
        self._inner.diagonal().sub_(self.spread / self._counts)
        self._residuals = torch.cat(
            [r / math.sqrt(len(r) - 1) for r in residuals]
        )  # R R^T summed is the sum of the covariances
        alike, pairs = _alike(groups)
        self._alike = alike
        self._freedom = min(pairs, float((self._counts - 1).sum()))

    def form(self, c: Tensor) -> Estimate:
        """Return sum_gh c_gh <mu_g, mu_h> for a symmetric c [G, G], with its 95 % interval."""
        value = float((c * self._inner).sum())
        if self._alike is None:
            return Estimate(value, None)
        s, m = self.spread, self._counts
        pairs = torch.outer(s / m, s / m)
        pairs.diagonal().copy_(s.square() / (m * (m - 1)))
        noise = 2 * self._alike * float((c.square() * pairs).sum())
        wide = _quantile((1 - LEVEL) / 2, self._freedom)
        half = wide * math.sqrt(noise + self._linear(c))
        return Estimate(value, math.hypot(half, NORMAL * self._off * max(value, 0.0)))

    def _linear(self, c: Tensor) -> float:
        """Return sum_g 4 <b_g, S_g b_g> / m_g with b = c mu: the variance by the means' size.

        The estimated b has noise too, of which the covariance makes tr(S S): that is taken off.
        """
        s, m = self.spread, self._counts
        total = float(s.sum())
        if total == 0:
            return 0.0
        along = (self._residuals @ (c @ self._means).T).square().sum(0) / total
        along -= (self._alike or 0.0) * (c.square() @ (s / m))
        return max(float((4 * s / m * along).sum()), 0.0)


def _alike(groups: Sequence[Tensor]) -> tuple[float | None, float]:
    """Return tr(S_g S_h) / (tr S_g tr S_h) over independent pairs, and their degrees of freedom."""
    if all(len(group) >= 4 for group in groups):
        pairs = [(group[: len(group) // 2], group[len(group) // 2 :]) for group in groups]
    else:
        pairs = list(itertools.combinations(groups, 2))
    both = sizes = freedom = 0.0
    for one, two in pairs:
        one, two = one - one.mean(0), two - two.mean(0)
        dof = (len(one) - 1) * (len(two) - 1)
        both += float((one @ two.T).square().sum()) / dof
        sizes += float(_spread(one) * _spread(two))
        freedom += dof
    return (both / sizes if sizes else 0.0, freedom) if pairs else (None, 0.0)


def _spread(residuals: Tensor) -> Tensor:
    return residuals.square().sum() / (len(residuals) - 1)


def pooled(found: Sequence[Estimate], sketch: int | None = None) -> Estimate:
    """Return the mean of independent estimates; a mean of squares is taken before the root.

    Parameters
    ----------
    sketch
        The size of the one sketch behind all of them, where they are squared norms: its error is
        the same in all, and does not average out.
    """
    value = math.fsum(estimate.value for estimate in found) / len(found)
    errors = [estimate.error for estimate in found if estimate.error is not None]
    if len(errors) < len(found):
        error = None
    else:
        off = 0.0 if sketch is None else NORMAL * math.sqrt(2 / sketch) * max(value, 0.0)
        error = math.hypot(math.hypot(*errors) / len(found), off)
    return Estimate(value, error, any(estimate.lower for estimate in found))


def largest(found: Sequence[Estimate], together: Estimate, freedom: float = math.inf) -> Estimate:
    """Return the largest of several quantities that are known with noise.

    The largest of the noisy values would be too large, by the noise. So each is drawn to the mean
    as far as noise explains their spread (James & Stein 1961); equal quantities give their mean.
    The interval holds for whatever quantities: the lower ends of the mean and of each of them are
    below the largest, and so is it below the largest of their upper ends (Bonferroni's).

    Parameters
    ----------
    together
        The estimate of the quantities' mean.
    freedom
        The degrees of freedom of the intervals in `found`.
    """
    errors = [estimate.error for estimate in found if estimate.error is not None]
    values = [estimate.value for estimate in found]
    if len(errors) < len(found) or together.error is None:
        return Estimate(together.value, None, lower=True)
    middle = together.value
    spread = float(np.var(values, ddof=1)) if len(values) > 1 else 0.0
    quantile = _quantile((1 - LEVEL) / 2, freedom)
    noise = math.fsum((error / quantile) ** 2 for error in errors) / len(errors)
    kept = max(1 - noise / spread, 0.0) if spread > 0 else 0.0
    value = max(middle + kept * (v - middle) for v in values)
    wider = _quantile((1 - LEVEL) / 2 / len(found), freedom) / quantile
    pairs = list(zip(values, errors, strict=True))
    high = max(middle + together.error, *(v + wider * error for v, error in pairs), value)
    low = min(max(middle - together.error, *(v - wider * error for v, error in pairs)), value)
    return Estimate.between(low, value, high, lower=True)


def _joined(values: list[float], sketch_error: float, lower: bool) -> Estimate:
    """Return the mean over workers; all share one sketch, so its error does not average out."""
    found = mean(values, lower)
    if found.error is None:
        return found
    return Estimate(found.value, math.hypot(found.error, NORMAL * sketch_error), lower)


def _quantile(above: float, freedom: float) -> float:
    """Return what Student's t, or a normal value at infinite freedom, exceeds so often."""
    from scipy.special import ndtri, stdtrit  # which every worker would import, and none uses

    return float(-ndtri(above) if math.isinf(freedom) else stdtrit(freedom, 1 - above))


def _student(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    return float(_quantile((1 - LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
