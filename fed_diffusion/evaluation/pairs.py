"""What the intervals of KID and recall need of all pairs of images, a block of pairs at a time.

Both figures are wanted again without each of a few groups of images. Kernels and distances are
computed once; only sums over groups, and nearest neighbours within groups, are kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROWS = 1024
"""How many images have their kernels or distances to a group or set in memory at once."""


def kernel_sums(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return sums of the kernel (x.y / d + 1)^3 over the pairs of groups of two sets.

    Parameters
    ----------
    ours, theirs
        Features of each group, [size, d].

    Returns
    -------
    Tensor
        float64 [groups of ours, groups of theirs].
    """
    return torch.tensor([[_kernel_sum(a, b) for b in theirs] for a in ours], dtype=torch.float64)


def kernel_sums_within(groups: Sequence[Tensor]) -> Tensor:
    """Return `kernel_sums` of the groups of one set, without an image's pair with itself."""
    count = len(groups)
    sums = torch.zeros(count, count, dtype=torch.float64)
    for i, a in enumerate(groups):
        for j in range(i, count):
            sums[i, j] = sums[j, i] = _kernel_sum(a, groups[j])
        sums[i, i] -= _cube(a.square().sum(1), a.shape[1])
    return sums


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return sum(_cube(rows @ b.T, a.shape[1]) for rows in a.split(ROWS))


def _cube(products: Tensor, d: int) -> float:
    return float((products / d + 1).pow_(3).sum(dtype=torch.float64))


def recalls_without(groups: Sequence[Tensor], real: Tensor, neighbours: int) -> Tensor:
    """Return the recall of the real images without each group of the generated ones.

    A real image is recalled if it is no farther from some generated image than the `neighbours`-th
    nearest generated image is from that one.

    Parameters
    ----------
    groups
        Features of the generated images by group, [size, d]; any of them leave more than
        `neighbours` images.
    real
        Features, [m, d].

    Returns
    -------
    Tensor
        float64 [groups].
    """
    generated = torch.cat(list(groups))
    radii = _radii_without(generated, [len(group) for group in groups], neighbours)
    recalled = torch.zeros(len(groups), dtype=torch.int64, device=generated.device)
    for rows in real.split(ROWS):
        apart = torch.cdist(rows, generated)
        recalled += torch.stack([(apart <= radius).any(1).sum() for radius in radii])
    return recalled.cpu().double() / len(real)


def _radii_without(generated: Tensor, sizes: list[int], neighbours: int) -> Tensor:
    """Return [groups, n]: distances to the neighbour without each group; -1 in the group itself."""
    blocks = []
    for rows in generated.split(ROWS):
        # an image is the nearest to itself
        near = [
            part.topk(min(neighbours + 1, part.shape[1]), largest=False).values
            for part in torch.cdist(rows, generated).split(sizes, dim=1)
        ]
        blocks.append(
            torch.stack(
                [
                    torch.cat(near[:j] + near[j + 1 :], dim=1).kthvalue(neighbours + 1).values
                    for j in range(len(sizes))
                ]
            )
        )
    radii = torch.cat(blocks, dim=1)
    start = 0
    for radius, size in zip(radii, sizes, strict=True):
        radius[start : start + size] = -1
        start += size
    return radii
