"""What a run directory says of the data, if the server has them: who holds what, some images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.data import ImageSet, class_count, partition, split_holdout
from fed_diffusion.report.grids import save_grid
from fed_diffusion.store.files import write_atomic

DATA = "data.json"
REAL = "samples/real.png"


def write_data(run_dir: Path, dataset: ImageSet, config: Config) -> None:
    """Write data.json and samples/real.png, for the report of a run that has only begun.

    Under differential privacy no real image is written: what is in samples/ is covered there.
    """
    facts = dataset.facts() | {"clients": clients_of(dataset, config)}
    write_atomic(run_dir / DATA, json.dumps(facts) + "\n")
    if config.privacy.clip is None:
        images, labels = real_images(dataset, config)
        if len(images):
            save_grid(images, run_dir / REAL, labels=labels)


def clients_of(dataset: ImageSet, config: Config) -> list[dict[str, Any]]:
    """Return what each client holds: the images that it trains on, those held out, and its labels.

    `labels` counts both kinds of images together, by label; it is missing without classes. `name`
    is that of the client's folder, where each client has one.
    """
    found = []
    for client, indices in enumerate(partition(dataset, config)):
        train, held_out = split_holdout(indices, config, client)
        holds: dict[str, Any] = {"client": client, "images": len(train), "held_out": len(held_out)}
        if config.data.partition == "folders" and dataset.folders is not None:
            holds["name"] = dataset.folders[client]
        if dataset.labels is not None:
            counts = torch.bincount(dataset.labels[indices], minlength=len(dataset.per_class()))
            holds["labels"] = counts.tolist()
        found.append(holds)
    return found


def grid_labels(config: Config) -> list[int] | None:
    """Return the classes of the images on the final grid: every class in turn, or None."""
    classes = class_count(config.data) if config.model.conditional else None
    return [i % classes for i in range(config.evaluation.grid)] if classes else None


def real_images(dataset: ImageSet, config: Config) -> tuple[Tensor, list[int] | None]:
    """Return as many real images as the final grid has, with classes where the grid has classes.

    They are of the same classes in the same order, as far as the set has as many of each; without
    classes they are spread evenly over the set.
    """
    wanted = grid_labels(config)
    if wanted is None or dataset.labels is None:
        count = min(config.evaluation.grid, len(dataset))
        return dataset.images[torch.linspace(0, len(dataset) - 1, count).long()], None
    left = {c: iter((dataset.labels == c).nonzero()[:, 0].tolist()) for c in set(wanted)}
    chosen = [(label, index) for label in wanted if (index := next(left[label], None)) is not None]
    return dataset.images[[index for _, index in chosen]], [label for label, _ in chosen]
