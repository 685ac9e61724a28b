"""Masks that drop single weights: zeros scattered over a dense network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

WORD = 1 << 32
"""Positions and ratios are fractions of this, so that both ends compute with whole numbers."""


def random_mask(
    theta: Mapping[str, Tensor], keep: float, stream: np.random.Philox
) -> dict[str, Tensor]:
    """Keep coordinate i if the top 32 bits of the i-th raw word are below floor(p 2^32)."""
    # comparing whole words with floor(p 2^32) 2^32 is the same, and one pass less
    below = math.floor(keep * WORD) << 32
    if below == 1 << 64:
        return {n: torch.ones(v.shape, dtype=torch.bool) for n, v in theta.items()}
    return {
        name: torch.from_numpy(
            np.asarray(stream.random_raw(value.numel())) < np.uint64(below)
        ).view(value.shape)
        for name, value in theta.items()
    }


def top_k_mask(theta: Mapping[str, Tensor], keep: float, per: str) -> dict[str, Tensor]:
    """Keep the largest |theta|, of each tensor or of all together (`per` global)."""
    if per == "global":
        flat = torch.cat([value.detach().abs().flatten() for value in theta.values()])
        kept = top_k(flat, keep).split([value.numel() for value in theta.values()])
        return {n: m.view(v.shape) for (n, v), m in zip(theta.items(), kept, strict=True)}
    return {
        name: top_k(value.detach().abs().flatten(), keep).view(value.shape)
        for name, value in theta.items()
    }


def rounded(keep: float, n: int) -> int:
    """Return how many of n a ratio keeps: keep * n, halves rounded up."""
    return math.floor(keep * n + 0.5)


def top_k(magnitude: Tensor, keep: float) -> Tensor:
    """Return the round-half-up(keep n) largest of n values as a bool mask; ties to the lower
    index.
    """
    n = magnitude.numel()
    k = rounded(keep, n)
    if k in (0, n):
        return torch.full((n,), k == n, dtype=torch.bool)
    threshold = magnitude.kthvalue(n - k + 1).values
    mask = magnitude > threshold
    ties = torch.nonzero(magnitude == threshold).flatten()
    mask[ties[: k - int(mask.sum())]] = True
    return mask


def balanced_starts(keeps: Mapping[int, float]) -> tuple[dict[int, int], int]:
    """Return where each client's dropped interval starts on the circle, and where they all end.

    The intervals of length 1 - keep lie end to end around a circle of length 2^32. With D their
    total length, a position is dropped by ceil(D) clients below the returned end (D's fractional
    part) and by floor(D) from there on: coverage is as even as the ratios allow, Gamma =
    N - ceil(D).
    """
    starts, here = {}, 0
    for client, keep in keeps.items():
        starts[client] = here
        here = (here + dropped_length(keep)) % WORD
    return starts, here


def dropped_length(keep: float) -> int:
    """Return 1 - keep as a part of 2^32, never more than the ratio says."""
    return WORD - math.ceil(keep * WORD)


def balanced_mask(
    theta: Mapping[str, Tensor],
    keep: float,
    per: str,
    start: int,
    end: int,
    stream: np.random.Philox,
) -> dict[str, Tensor]:
    """Drop an interval of positions; every client of a round has the same positions, drawn anew.

    The smallest weights take the positions below `end`, which one client more drops than the
    others. Within either part positions are random, so all clients drop alike, large and small,
    and the parts go round from one round to the next.
    """
    large = top_k_mask(theta, 1 - end / WORD, per)
    length = dropped_length(keep)
    masks = {}
    for name, words in _words(theta, stream):
        is_large = large[name].flatten().numpy()
        low = (words * np.uint64(end)) >> np.uint64(32)
        high = np.uint64(end) + ((words * np.uint64(WORD - end)) >> np.uint64(32))
        position = np.where(is_large, high, low)
        dropped = (position - np.uint64(start)) % np.uint64(WORD) < np.uint64(length)
        masks[name] = torch.from_numpy(~dropped).view(theta[name].shape)
    return masks


def _words(
    theta: Mapping[str, Tensor], stream: np.random.Philox
) -> Iterator[tuple[str, np.ndarray]]:
    """Return the top 32 bits of one raw word per coordinate, tensor by tensor."""
    for name, value in theta.items():
        yield name, np.asarray(stream.random_raw(value.numel())) >> np.uint64(32)
