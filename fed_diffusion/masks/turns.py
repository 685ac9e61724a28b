"""Balanced masks of the smallest weights: weak workers take turns among what must be dropped.

Worker n drops k_n = floor((1 - keep) D) of a tensor's D weights, K of them in all. No masks with
these numbers have a larger Gamma than N - c with c = ceil(K / D), since some weight is dropped
ceil(K / D) times. Of all masks with that Gamma, these lose the least: the sum over the workers of
||theta - theta m_n||^2, which is what the bound's w^2 N stands for, is as small as can be.

Why: the t smallest weights can be dropped P(t) = min(c t, sum_n min(k_n, t)) times at most, c times
each, and by no worker more than once each or more often than it drops. All drops fall on small
weights, as far as that allows, where the t smallest are dropped exactly P(t) times for every t: and
by summation by parts the sum over weights of (drops) theta^2, theta^2 ascending, is least where all
these partial sums are largest. `deal` attains them all at once. It goes from the largest weights
that are dropped to the smallest, in blocks of equal rank. Of a block [t0, t1) it gives each worker
q_n of the t1 - t0 weights, between max(0, r_n - t0) and min(t1 - t0, r_n), where r_n is what the
worker still has to drop, and P(t1) - P(t0) in all. Such q exist, and leave such an r again, because
P(t) is concave, and c t up to the rank where sum_n min(k_n, t) falls below it. Laid end to end
around the block as around a circle, parts no longer than the circle put every weight into at most c
of them, and none twice into one.

Which q within these limits is free: it decides how evenly the least sum is shared out. The most
goes to the worker that would come to the least if all that it has left to drop were the smallest of
all. To share it out best of all is a partition problem, for which no fast algorithm is known; what
this leaves uneven is of the size of the last blocks, which are the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

BLOCKS = 64
"""The number of blocks of equal rank in each tensor."""
FINEST = 10**6
"""Ratios are fractions with denominators up to this: 0.8 is 4/5, whatever its bits are."""


def as_fraction(keep: float) -> Fraction:
    """Return a keep ratio as the fraction that was meant."""
    return Fraction(repr(float(keep))).limit_denominator(FINEST)


def dropped_count(keep: Fraction, size: int) -> int:
    """Return k_n, how many of so many weights a worker drops; never more than its ratio says."""
    return math.floor((1 - keep) * size)


@dataclass(frozen=True)
class Deal:
    """A deal says which worker drops which weights of one tensor, or of several laid end to end.

    Attributes
    ----------
    order
        The weights by magnitude, smallest first; ties by place.
    edges
        The ranks at which blocks begin, and the end of the last.
    starts, lengths
        For every block and worker: where on the block's circle it begins to drop, and how many.
    """

    order: np.ndarray
    edges: list[int]
    starts: np.ndarray
    lengths: np.ndarray

    def mask(self, worker: int) -> np.ndarray:
        """Return what a worker keeps: true or false for every weight."""
        dropped = np.zeros(len(self.order), bool)  # by rank
        for block, (low, high) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            here, size = low + int(self.starts[block, worker]), high - low
            end = here + int(self.lengths[block, worker])
            dropped[here : min(end, high)] = True
            dropped[low : max(low, end - size)] = True
        kept = np.ones(len(self.order), bool)
        kept[self.order[dropped]] = False
        return kept


def deal(magnitude: np.ndarray, keeps: Sequence[Fraction], lost: np.ndarray) -> Deal:
    """Deal out one tensor.

    Parameters
    ----------
    magnitude
        |theta|, one-dimensional.
    keeps
        The workers' keep ratios.
    lost
        What each has lost so far, float64; what it loses here is added.
    """
    size = len(magnitude)
    counts = np.array([dropped_count(keep, size) for keep in keeps])
    order = np.argsort(magnitude, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(magnitude[order].astype(np.float64) ** 2)])
    edges, most = _edges(counts, size)
    starts = np.zeros((len(edges) - 1, len(counts)), np.int64)
    lengths = np.zeros_like(starts)
    left = counts.copy()
    for block in reversed(range(len(edges) - 1)):
        low, high = edges[block], edges[block + 1]
        wanted = most(high) - most(low)
        taken = _share(left, low, high, wanted, lost + sums[left])
        lengths[block] = taken
        starts[block] = (np.cumsum(taken) - taken) % (high - low)
        lost += taken * ((sums[high] - sums[low]) / (high - low))
        left -= taken
    return Deal(order, edges, starts, lengths)


def _edges(counts: np.ndarray, size: int) -> tuple[list[int], Callable[[int], int]]:
    """Return where blocks begin and end, and P."""
    times = -(-int(counts.sum()) // max(size, 1))

    def by_workers(rank: int) -> int:
        return int(np.minimum(counts, rank).sum())

    def most(rank: int) -> int:
        return min(times * rank, by_workers(rank))

    full, beyond = 0, size + 1  # c t <= sum min(k, t) up to a rank, and from then on not
    while beyond - full > 1:
        middle = (full + beyond) // 2
        full, beyond = (middle, beyond) if times * middle <= by_workers(middle) else (full, middle)
    if not times:
        return [0], most
    inner = {full * i // BLOCKS for i in range(BLOCKS + 1)}
    # one rank may be dropped less than c times; beyond it whoever goes on drops all up to an end
    rest = int(counts.sum()) > times * full
    outer = {full + 1, *(int(k) for k in counts if k > full + 1)} if rest else set()
    return sorted(inner | outer), most


def _share(left: np.ndarray, low: int, high: int, wanted: int, level: np.ndarray) -> np.ndarray:
    """Return how many weights of a block each worker drops; those of the lowest level take most."""
    taken = np.maximum(0, left - low)
    room = np.minimum(high - low, left) - taken
    wanted -= int(taken.sum())
    for worker in np.argsort(level, kind="stable"):
        if wanted <= 0:
            break
        more = min(int(room[worker]), wanted)
        taken[worker] += more
        wanted -= more
    return taken


def deal_all(theta: Mapping[str, Tensor], keeps: Sequence[Fraction], per: str) -> dict[str, Deal]:
    """Deal out every tensor, or with `per` global all of them as one, under the name "".

    What a worker loses in one tensor counts in the next, so that the loss is shared out evenly over
    the whole network.
    """
    flat = {n: v.detach().abs().flatten().numpy() for n, v in theta.items()}
    if per == "global":
        flat = {"": np.concatenate(list(flat.values()))} if flat else {}
    lost = np.zeros(len(keeps))
    return {name: deal(magnitude, keeps, lost) for name, magnitude in flat.items()}


def masks_of(
    deals: Mapping[str, Deal], theta: Mapping[str, Tensor], worker: int
) -> dict[str, Tensor]:
    """Return a worker's masks, as bools shaped like theta's tensors."""
    kept = {name: torch.from_numpy(found.mask(worker)) for name, found in deals.items()}
    if "" in kept:
        parts = kept[""].split([value.numel() for value in theta.values()])
        kept = dict(zip(theta, parts, strict=True))
    return {name: kept[name].view(value.shape) for name, value in theta.items()}
