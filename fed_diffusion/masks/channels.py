"""Masks that drop whole channel groups: which groups of each space a worker keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox
from fed_diffusion.masks.spaces import Channels, Layout

CHOICES = ("ordered", "rolling", "random", "magnitude")
"""The ways to choose the groups that a worker keeps.

ordered takes the first groups (HeteroFL, FjORD); rolling a window that moves by one group each
round (FedRolex); random draws groups per client and round; magnitude takes the groups of largest
norm in theta_r.
"""


def ordered(layout: Layout, counts: Mapping[str, int]) -> Channels:
    """Choose the first groups of every space: smaller networks are nested in larger ones."""
    return {name: tuple(range(counts[name])) for name in layout.spaces}


def rolling(layout: Layout, counts: Mapping[str, int], round: int) -> Channels:
    """Choose a window that starts at group round - 1 and wraps around."""
    return {
        name: tuple(sorted((round - 1 + i) % space.groups for i in range(counts[name])))
        for name, space in layout.spaces.items()
    }


def random(
    layout: Layout, counts: Mapping[str, int], seed: int, round: int, client: int
) -> Channels:
    """Choose the groups with the smallest raw words, one word per group, space by space."""
    stream = philox(seed, Purpose.MASK, round, client)
    kept = {}
    for name, space in layout.spaces.items():
        order = np.argsort(np.asarray(stream.random_raw(space.groups)), kind="stable")
        kept[name] = tuple(sorted(int(group) for group in order[: counts[name]]))
    return kept


def magnitude(layout: Layout, counts: Mapping[str, int], theta: Mapping[str, Tensor]) -> Channels:
    """Choose the groups of largest norm over all their values; ties go to the lower index."""
    norms = group_norms(layout, theta)
    kept = {}
    for name in layout.spaces:
        order = torch.argsort(norms[name], descending=True, stable=True)
        kept[name] = tuple(sorted(order[: counts[name]].tolist()))
    return kept


def balanced(
    layout: Layout,
    keeps: Mapping[int, float],
    round: int,
    theta: Mapping[str, Tensor],
) -> dict[int, Channels]:
    """Choose every client's groups so that no group is dropped much more often than others.

    Every space's groups stand in a circle, smallest norm first, and the clients' dropped parts lie
    end to end around the circle. So a group is dropped floor or ceil of (all drops / groups) times,
    and once more only if it is small. The clients' order moves by one each round, so that the drops
    move around the circle.
    """
    norms = group_norms(layout, theta)
    clients = list(keeps)
    turn = (round - 1) % len(clients)
    counts = {client: layout.counts(keep) for client, keep in keeps.items()}
    kept: dict[int, Channels] = {client: {} for client in clients}
    for name, space in layout.spaces.items():
        order = torch.argsort(norms[name], stable=True).tolist()
        here = 0
        for client in clients[turn:] + clients[:turn]:
            drops = space.groups - counts[client][name]
            dropped = {order[(here + i) % space.groups] for i in range(drops)}
            kept[client][name] = tuple(g for g in range(space.groups) if g not in dropped)
            here += drops
    return kept


def group_norms(layout: Layout, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the squared norm of every group, over all rows and columns that it takes along;
    float64.
    """
    norms = {
        name: torch.zeros(space.groups, dtype=torch.float64)
        for name, space in layout.spaces.items()
    }
    for name, axes in layout.axes.items():
        square = theta[name].detach().to("cpu", torch.float64).square()
        for dimension, axis in enumerate(axes):
            if not axis:
                continue
            others = [d for d in range(square.dim()) if d != dimension]
            sums = square.sum(others) if others else square
            offset = 0
            for part in axis:
                space = layout.spaces[part]
                channels = space.groups * space.size
                rows = sums[offset : offset + channels]
                norms[part] += rows.view(space.groups, space.size).sum(1)
                offset += channels
    return norms


def flatten(layout: Layout, channels: Channels) -> tuple[int, ...]:
    """Return the kept groups of all spaces one after another; the layout says where each ends."""
    return tuple(group for name in layout.spaces for group in channels[name])


def unflatten(layout: Layout, counts: Mapping[str, int], flat: tuple[int, ...]) -> Channels:
    """Undo `flatten`.

    Raises
    ------
    ValueError
        A wrong number of groups, a group that the model lacks, or groups out of order.
    """
    if len(flat) != sum(counts.values()):
        raise ValueError(
            f"{len(flat)} groups are named, but the ratio means {sum(counts.values())}"
        )
    channels, offset = {}, 0
    for name, space in layout.spaces.items():
        groups = flat[offset : offset + counts[name]]
        offset += counts[name]
        if any(not 0 <= group < space.groups for group in groups):
            raise ValueError(f"{name} has groups 0 to {space.groups - 1}, not all of {groups}")
        if list(groups) != sorted(set(groups)):
            raise ValueError(f"the groups of {name} are not in ascending order: {groups}")
        channels[name] = groups
    return channels
