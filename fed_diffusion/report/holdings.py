"""What a run directory says of the data, if the server has them: who holds what, some images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.data import ImageSet, Share
from fed_diffusion.report.grids import save_grid
from fed_diffusion.store.files import write_atomic

DATA = "data.json"
REAL = "samples/real.png"


def write_clients(
    run_dir: Path, dataset: ImageSet, shares: Sequence[Share], by_folder: bool
) -> None:
    """Write data.json, for the report of a run that has only begun; see `clients_of`."""
    facts = dataset.facts() | {"clients": clients_of(dataset, shares, by_folder)}
    write_atomic(run_dir / DATA, json.dumps(facts) + "\n")


def write_real(run_dir: Path, dataset: ImageSet, count: int, classes: int | None) -> None:
    """Write samples/real.png, as many real images as the final grid has; see `real_images`."""
    images, labels = real_images(dataset, count, classes)
    if len(images):
        save_grid(images, run_dir / REAL, labels=labels)


def clients_of(dataset: ImageSet, shares: Sequence[Share], by_folder: bool) -> list[dict[str, Any]]:
    """What each client holds: the images that it trains on, those held out, and its labels.

    `labels` counts both kinds of images together, by label; it is missing without classes. `name`
    is that of the client's folder, where each client has one.

    Parameters
    ----------
    by_folder
        Whether client n holds what is in the n-th folder (data.partition: folders).
    """
    found = []
    for client, (train, held) in enumerate(shares):
        holds: dict[str, Any] = {"client": client, "images": len(train), "held_out": len(held)}
        if by_folder and dataset.folders is not None:
            holds["name"] = dataset.folders[client]
        if dataset.labels is not None:
            labels = dataset.labels[np.concatenate([train, held])]
            holds["labels"] = torch.bincount(labels, minlength=len(dataset.per_class())).tolist()
        found.append(holds)
    return found


def grid_labels(count: int, classes: int | None) -> list[int] | None:
    """The classes of the images on the final grid: every class in turn; None without classes.

    Parameters
    ----------
    count
        The images on the grid: evaluation.grid.
    classes
        How many labels the network is conditioned on, if it is.
    """
    return [i % classes for i in range(count)] if classes else None


def real_images(
    dataset: ImageSet, count: int, classes: int | None
) -> tuple[Tensor, list[int] | None]:
    """As many real images as the final grid has, with their classes where the grid has classes.

    They are of the same classes in the same order, as far as the set has as many of each; without
    classes they are spread evenly over the set. `count` and `classes` are as for `grid_labels`.
    """
    wanted = grid_labels(count, classes)
    if wanted is None or dataset.labels is None:
        few = min(count, len(dataset))
        return dataset.images[torch.linspace(0, len(dataset) - 1, few).long()], None
    left = {c: iter((dataset.labels == c).nonzero()[:, 0].tolist()) for c in set(wanted)}
    chosen = [(label, index) for label in wanted if (index := next(left[label], None)) is not None]
    return dataset.images[[index for _, index in chosen]], [label for label, _ in chosen]
