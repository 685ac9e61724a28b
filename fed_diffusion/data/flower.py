"""Flower's own partitioners (package flwr-datasets) as splits: which client holds which images."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.data.image_set import ImageSet

PACKAGE = "flwr_datasets"
INSTALL = "pip install 'fed-diffusion[hf]'"


def require(name: str) -> None:
    """Refuse a partitioner of a package that is not installed, with the command that helps."""
    if name.split(".")[0] == PACKAGE and find_spec(PACKAGE) is None:
        raise ConfigError(f"data.partition = {name!r} needs the package flwr-datasets: {INSTALL}.")


def is_partitioner(found: Any) -> bool:
    """Whether an object is a class of partitioners, of Flower or of the user's own."""
    module = sys.modules.get(f"{PACKAGE}.partitioner")  # else no class can be derived from it
    return module is not None and inspect.isclass(found) and issubclass(found, module.Partitioner)


def split_by(
    kind: Any,
    options: Mapping[str, Any],
    dataset: ImageSet,
    clients: int,
    draw: np.random.Generator,
) -> list[np.ndarray]:
    """The parts that a partitioner makes of a table with the column `label`.

    `num_partitions`, `partition_by` (label) and `seed` are given to it where it takes them and the
    options do not.
    """
    import datasets

    columns = {"index": np.arange(len(dataset))}
    if dataset.labels is not None:
        columns["label"] = dataset.labels.numpy()
    given = {"num_partitions": clients, "partition_by": "label", "seed": int(draw.integers(2**31))}
    taken = inspect.signature(kind).parameters
    partitioner = kind(**{k: v for k, v in given.items() if k in taken} | dict(options))
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    found = partitioner.num_partitions
    if found != clients:
        raise ValueError(f"it makes {found} parts, and clients = {clients}")
    parts = (partitioner.load_partition(client) for client in range(clients))
    return [np.asarray(part["index"][:], dtype=np.int64) for part in parts]
