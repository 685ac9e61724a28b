"""Whether a generator gives its training images away, and whose.

Distances are taken between pixels: that needs no network, so a distance means the same in every
run, and a classifier's features put all images of a class close together. The method finds copies
and near copies; it does not recognise an image that was moved, recoloured or cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.data.partition import Share

QUANTILE = 0.01
"""The quantile of the held-out images' distances below which an image is taken for a copy."""
ALPHA = 1e-3
"""The probability with which a generator without a leak may be said to have one."""
CHUNK = 1024  # images whose distances to a chunk of training images are in memory at once


@dataclass(frozen=True, eq=False)
class Holdings:
    """What the clients of a run hold.

    Attributes
    ----------
    images
        uint8 [m, C, H, W].
    train
        int64 indices of what each client trained on.
    held
        int64 indices of what no client trained on.
    flip
        Whether training saw mirror images too.
    """

    images: Tensor
    train: list[np.ndarray]
    held: np.ndarray
    flip: bool = False


def holdings(dataset: ImageSet, shares: Sequence[Share], flip: bool) -> Holdings:
    """Who trained on which images of a run's data set, and which images nobody trained on."""
    held = np.concatenate([share.held for share in shares])
    return Holdings(dataset.images, [share.train for share in shares], held, flip)


def memorisation(
    images: Tensor, known: Holdings | None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Compare generated images' distances to their nearest training image with held-out images'.

    Let tau be the k-th smallest of the M held-out images' distances, k = max(1, floor(M / 100)).
    If generated images were as fresh as held-out ones, the number of the n nearer than tau would
    be beta-binomial(n, k, M + 1 - k), whatever the distribution (smaller with ties). That gives
    `p_value`; and a client is in `copied` if the images nearer than tau to its own are by
    themselves more than all clients' could be with probability 1e-3.

    Parameters
    ----------
    images
        Generated, uint8 [n, C, H, W].
    known
        None where the server has no data.

    Returns
    -------
    dict
        `why`: why there is nothing else, or None. distance, tau, closer (the share of generated
        images nearer than tau), expected (what it would be without a leak), p_value, medians
        [generated, held out], median_ratio, copied (client indices), clients (index, images,
        share of the generated images nearest to one of its own, share of the held-out ones,
        closer: share of all generated images nearer than tau to one of its own). Distances are
        root mean square differences per pixel value, 0 to 255.
    """
    if known is None:
        return {"why": "the server does not hold the clients' images"}
    if len(known.held) == 0:
        return {"why": "no images were held out to compare with (data.holdout)"}
    if len(images) == 0 or images.shape[1:] != known.images.shape[1:]:
        return {"why": "there are no generated images of the training images' shape"}
    owner = np.repeat(np.arange(len(known.train)), [len(part) for part in known.train])
    trained = known.images[torch.from_numpy(np.concatenate(known.train))]
    fresh = known.images[torch.from_numpy(known.held)]
    at_fresh, next_to_fresh = nearest(fresh, trained, known.flip, device)
    at, next_to = nearest(images, trained, known.flip, device)
    n, m = len(at), len(at_fresh)
    k = max(1, math.floor(QUANTILE * m))
    tau = float(np.sort(at_fresh)[k - 1])
    if tau == 0:
        return {"why": f"{(at_fresh == 0).sum()} held-out images of {m} are training images too"}
    chance = _at_least(n, k, m + 1 - k)
    near = at < tau
    clients, ours = range(len(known.train)), owner[next_to]
    copies = np.bincount(ours[near], minlength=len(clients))
    share = np.bincount(ours, minlength=len(clients)) / n
    fresh_share = np.bincount(owner[next_to_fresh], minlength=len(clients)) / m
    medians = [float(np.median(at)), float(np.median(at_fresh))]
    return {
        "why": None,
        "distance": "pixels, root mean square",
        "tau": tau,
        "closer": float(near.mean()),
        "expected": k / (m + 1),
        "p_value": float(chance[near.sum()]),
        "medians": medians,
        "median_ratio": medians[0] / medians[1],
        "copied": [c for c in clients if chance[copies[c]] <= ALPHA],
        "clients": [
            {
                "client": c,
                "images": len(known.train[c]),
                "share": float(share[c]),
                "held_out_share": float(fresh_share[c]),
                "closer": float(copies[c] / n),
            }
            for c in clients
        ],
    }


def _at_least(n: int, a: int, b: int) -> np.ndarray:
    """Return P(X >= 0), ..., P(X >= n) of a beta-binomial X; importing scipy.stats takes
    seconds.
    """
    x = np.arange(n + 1)
    ways = -special.betaln(n - x + 1, x + 1) - math.log(n + 1)
    mass = np.exp(ways + special.betaln(x + a, n - x + b) - special.betaln(a, b))
    return np.minimum(1.0, np.cumsum(mass[::-1])[::-1])


def nearest(
    images: Tensor, trained: Tensor, flip: bool = False, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the root mean square pixel difference to the nearest training image, and its index.

    Parameters
    ----------
    images, trained
        uint8 [n, C, H, W] and [m, C, H, W].
    flip
        Whether a training image's mirror image is as good.

    Returns
    -------
    distance float64 [n], index int64 [n]
    """
    best = torch.full((len(images),), math.inf, dtype=torch.float64)
    index = torch.zeros(len(images), dtype=torch.int64)
    for mirrored in (False, True) if flip else (False,):
        candidates = trained.flip(-1) if mirrored else trained
        for start in range(0, len(images), CHUNK):
            rows = slice(start, start + CHUNK)
            found = _nearest_index(images[rows], candidates, device)
            # the products are rounded: measure the one that they choose again
            apart = images[rows].double() - candidates[found].double()
            distance = apart.square().mean(dim=(1, 2, 3)).sqrt()
            better = distance < best[rows]
            best[rows] = torch.where(better, distance, best[rows])
            index[rows] = torch.where(better, found, index[rows])
    return best.numpy(), index.numpy()


def _nearest_index(rows: Tensor, candidates: Tensor, device: torch.device | str) -> Tensor:
    """Return argmin |x - y|^2 = argmin |y|^2 - 2 x.y, a chunk of candidates at a time."""
    x = _centred(rows, device)
    least = torch.full((len(rows),), math.inf, device=device)
    index = torch.zeros(len(rows), dtype=torch.int64, device=device)
    for start in range(0, len(candidates), 8 * CHUNK):
        y = _centred(candidates[start : start + 8 * CHUNK], device)
        value, found = (y.square().sum(1) - 2 * x @ y.T).min(dim=1)
        index = torch.where(value < least, found + start, index)
        least = torch.minimum(value, least)
    return index.cpu()


def _centred(images: Tensor, device: torch.device | str) -> Tensor:
    """Return [n, C, H, W] as [n, d] around 0, where float32 products lose least."""
    return images.to(device).flatten(1).float() - 127.5
