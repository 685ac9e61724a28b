"""Which client holds which images: index arrays, a function of (images, config, seed) alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.config import ConfigError
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.data.flower import is_partitioner, require, split_by

LARGEST_ALPHA = 1e9  # as good as equal parts; far above it NumPy's Dirichlet overflows


class Split(Protocol):
    """What data.partition names: which client holds which images.

    Parameters
    ----------
    dataset
        All images, with their labels and client folders where there are any.
    clients
        N; at least one, and at most as many as there are images.
    draw
        The only source of randomness, seeded by the run: every process comes to the same parts.

    Returns
    -------
    sequence of N whole-number arrays
        Indices of `dataset`, one array per client, in any order; none is empty, and no image is
        held twice. What is held out is taken off afterwards.
    """

    def __call__(
        self, dataset: ImageSet, clients: int, draw: np.random.Generator, /
    ) -> Sequence[np.ndarray]: ...


class Share(NamedTuple):
    """What one client of a run holds, as sorted int64 indices of the images."""

    train: np.ndarray
    """The images that the client trains on."""
    held: np.ndarray
    """The images that are held out, for the client's held-out loss."""


def splits(config: DataConfig) -> dict[str, Split]:
    """Return the built-in splits by name, with the settings that they take."""
    return {
        "iid": _iid,
        "dirichlet": partial(_dirichlet, alpha=config.alpha),
        "shards": partial(_shards, per_client=config.classes_per_client),
        "folders": _by_folder,
    }


def shares_of(dataset: ImageSet, data: DataConfig, clients: int, seed: int) -> list[Share]:
    """What each client trains on and holds out: `partition`, and then `split_holdout`."""
    parts = partition(dataset, data, clients, seed)
    return [split_holdout(part, data.holdout, seed, client) for client, part in enumerate(parts)]


def partition(dataset: ImageSet, data: DataConfig, clients: int, seed: int) -> list[np.ndarray]:
    """Split the images over the clients as data.partition says.

    - ``iid``: at random; sizes differ by at most 1.
    - ``dirichlet``: each class is cut over the clients in proportions Dir(alpha, ..., alpha)
      (Hsu et al. 2019); a client left with nothing is given one image of the largest.
    - ``shards``: each class is cut into pieces, every piece of one class only, and each client
      is dealt at most `classes_per_client` of them (McMahan et al. 2017); see `_shards`.
    - ``folders``: client n holds what is in the n-th folder.
    - ``module:function``: what a `Split` of the user's own says.
    - ``flwr_datasets.partitioner:Class``: what one of Flower's partitioners says.

    Returns
    -------
    list of int64 arrays, one per client
        Sorted, disjoint, together all indices of `dataset` (a split of the user's own may leave
        some out), none of them empty. Hold-out is not taken off yet (`split_holdout`); it leaves
        each client at least one image to train on.

    Raises
    ------
    ConfigError
        With more clients than images, or a partition that needs labels or folders the set lacks,
        or one of the user's own that gives something else.
    """
    n, kind, built_in = len(dataset), data.partition, splits(data)
    require(kind)
    split: Split = resolve("data.partition", kind, built_in)
    if clients > n and kind != "folders":
        raise ConfigError(
            f"clients = {clients} is more than the {n} images of {dataset.name!r}; every "
            f"client needs at least one to train on. Use at most {n} clients, or more images."
        )
    draw = generator(seed, Purpose.PARTITION)
    if kind in built_in:
        parts: Sequence[np.ndarray] = split(dataset, clients, draw)
    else:
        if is_partitioner(split):
            split = partial(split_by, split, data.partition_options)
        elif data.partition_options:
            raise ConfigError(
                f"data.partition_options: data.partition = {kind!r} is a function of yours, which "
                "takes none; they are for classes of flwr_datasets.partitioner."
            )
        with blamed("data.partition", kind):
            parts = [np.asarray(part) for part in split(dataset, clients, draw)]
            _check_parts(parts, n, clients)
    return [np.sort(part).astype(np.int64) for part in parts]


def _check_parts(parts: Sequence[np.ndarray], n: int, clients: int) -> None:
    """Raise `ValueError` for parts that are not as `Split` says."""
    if len(parts) != clients:
        raise ValueError(f"it returns {len(parts)} parts for clients = {clients}")
    for client, part in enumerate(parts):
        if part.ndim != 1 or not len(part) or part.dtype.kind not in "iu":
            raise ValueError(
                f"the part of client {client} is {part.dtype} {list(part.shape)}, not a list "
                "of whole numbers with one number or more"
            )
        if part.min() < 0 or part.max() >= n:
            raise ValueError(
                f"the part of client {client} has the indices {part.min()} to {part.max()}, and "
                f"there are images 0 to {n - 1}"
            )
    held, times = np.unique(np.concatenate(parts), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"image {held[times > 1][0]} is given out more than once")


def _iid(dataset: ImageSet, clients: int, draw: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(draw.permutation(len(dataset)), clients)


def split_holdout(indices: np.ndarray, holdout: float, seed: int, client: int) -> Share:
    """Set floor(holdout * n) of a client's n images aside for its held-out loss.

    Parameters
    ----------
    holdout
        The part that is held out: data.holdout.

    Returns
    -------
    train, held
        Sorted int64 arrays, disjoint, together `indices`; `train` is never empty unless `indices`
        is.
    """
    indices = np.sort(np.asarray(indices, dtype=np.int64))
    n = len(indices)
    held = max(0, min(math.floor(holdout * n), n - 1))
    order = generator(seed, Purpose.HOLDOUT, client=client).permutation(n)
    return Share(indices[np.sort(order[held:])], indices[np.sort(order[:held])])


def _labels(dataset: ImageSet, kind: str) -> np.ndarray:
    """Return the labels renumbered 0..K-1 without gaps."""
    if dataset.labels is None:
        raise ConfigError(
            f"data.partition = {kind!r} needs class labels and {dataset.name!r} has none. Use "
            "'iid' (or 'folders'), or for image_folder sort the images into class sub-folders."
        )
    return np.unique(dataset.labels.numpy(), return_inverse=True)[1]


def _by_folder(dataset: ImageSet, clients: int, draw: np.random.Generator) -> list[np.ndarray]:
    if dataset.folders is None or dataset.folder_of is None:
        raise ConfigError(
            f"data.partition = 'folders' needs images in one folder per client, and "
            f"{dataset.name!r} has no such folders. Use data.name = 'image_folder', or one of "
            "iid, dirichlet, shards."
        )
    found = len(dataset.folders)
    if found != clients:
        raise ConfigError(
            f"clients = {clients}, but data.partition = 'folders' found {found} client "
            f"folders. Set clients = {found}, or add or remove folders."
        )
    parts = _group(np.arange(len(dataset)), dataset.folder_of.numpy(), found)
    for name, part in zip(dataset.folders, parts, strict=True):
        if not len(part):
            raise ConfigError(f"data.partition = 'folders': the client folder {name!r} is empty.")
    return parts


def _group(order: np.ndarray, owner: np.ndarray, clients: int) -> list[np.ndarray]:
    """Return `order` split by owner[i], each part in the order of `order`."""
    by_owner = order[np.argsort(owner[order], kind="stable")]
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    return np.split(by_owner, ends[:-1])


def _dirichlet(
    dataset: ImageSet, clients: int, draw: np.random.Generator, *, alpha: float
) -> list[np.ndarray]:
    labels, n = _labels(dataset, "dirichlet"), len(dataset)
    owner = np.empty(n, dtype=np.int64)
    concentration = np.full(clients, min(alpha, LARGEST_ALPHA))
    for label in range(labels.max() + 1):
        members = draw.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(draw.dirichlet(concentration))[:-1] * len(members)
        owner[members] = np.searchsorted(np.floor(ends), np.arange(len(members)), side="right")
    # parts in random order, so that what an empty client gets is a random image of the largest
    parts = _group(draw.permutation(n), owner, clients)
    largest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(largest)
    for client in [c for c, part in enumerate(parts) if not len(part)]:
        size, donor = heapq.heappop(largest)  # ties go to the lower index
        parts[client], parts[donor] = parts[donor][-1:], parts[donor][:-1]
        heapq.heappush(largest, (size + 1, donor))
    return parts


def _shards(
    dataset: ImageSet, clients: int, draw: np.random.Generator, *, per_client: int
) -> list[np.ndarray]:
    """Make McMahan's pathological split, with shards that never straddle two classes.

    clients * per_client shards (or one per image, if that is fewer) are shared among the classes
    so that the largest shard is as small as possible; each class is shuffled and cut into its
    shards, equal to within one image; the shards are shuffled and dealt like cards. So a client
    holds 1 to `per_client` shards, hence at most that many classes. With equal classes whose
    number divides the number of shards, all shards have the same size and this is the original.
    """
    labels = _labels(dataset, "shards")
    sizes = np.bincount(labels)
    if clients * per_client < len(sizes):
        raise ConfigError(
            f"data.classes_per_client = {per_client} for clients = {clients} leaves some of the "
            f"{len(sizes)} classes to nobody. Use at least {math.ceil(len(sizes) / clients)}."
        )
    pieces = _apportion(sizes, min(clients * per_client, len(labels)))
    shards: list[np.ndarray] = []
    for label, count in enumerate(pieces):
        shards += np.array_split(draw.permutation(np.flatnonzero(labels == label)), count)
    deal = draw.permutation(len(shards))
    return [np.concatenate([shards[i] for i in deal[client::clients]]) for client in range(clients)]


def _apportion(sizes: np.ndarray, total: int) -> list[int]:
    """Return `total` shards over classes of `sizes` images: 1 each, then one by one to the largest.

    For len(sizes) <= total <= sum(sizes) no class gets more shards than it has images.
    """
    pieces = [1] * len(sizes)
    largest = [(-float(size), label) for label, size in enumerate(sizes)]
    heapq.heapify(largest)
    for _ in range(total - len(sizes)):
        _, label = heapq.heappop(largest)  # ties go to the lower label
        pieces[label] += 1
        heapq.heappush(largest, (-float(sizes[label]) / pieces[label], label))
    return pieces
