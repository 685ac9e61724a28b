"""The real images that evaluation.reference names, and what else the server knows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fed_diffusion.build import Setup
from fed_diffusion.config import ConfigError
from fed_diffusion.data.datasets import ImageSet, has_test_split, load_dataset, tell
from fed_diffusion.evaluation.checks import OWN_DATA
from fed_diffusion.evaluation.memorisation import Holdings, holdings


class Reference(NamedTuple):
    """The real images that generated images are compared with.

    `teacher` has the labels that a classifier trained on the spot learns. Where the reference is
    the test split, these are the training images, so that the figures of both splits come from the
    same classifier.
    """

    images: ImageSet
    teacher: ImageSet
    holdings: Holdings | None


def reference_set(setup: Setup, dataset: ImageSet | None) -> Reference | None:
    """The images that evaluation.reference names: the run's own, a part of them, a folder, or none.

    Parameters
    ----------
    dataset
        The run's own data, where it is in memory already.

    Raises
    ------
    ConfigError
        The data set has no test split, or cannot be loaded.
    """
    config, word = setup.config, setup.config.evaluation.reference
    if word == "none":
        return None
    if word not in OWN_DATA:
        folder = _folder(setup, word)
        return Reference(folder, folder, None)
    dataset = dataset if dataset is not None else load_dataset(config.data)
    known = holdings(dataset, setup.shares(dataset), config.data.flip)
    if word == "data":
        return Reference(dataset, dataset, known)
    train = _part(dataset, np.concatenate(known.train), "train")
    if word == "train":
        return Reference(train, train, known)
    if has_test_split(config.data):
        test = load_dataset(config.data, "test")
        return Reference(replace(test, name=f"{test.name} test"), train, known)
    if len(known.held) == 0:
        raise ConfigError(
            f"evaluation.reference = 'test': data.name = {config.data.name!r} has no test split of "
            "its own, and no images were held out. Use data or train, or a run with data.holdout "
            "above 0."
        )
    return Reference(_part(dataset, known.held, "held out"), train, known)


def _part(dataset: ImageSet, indices: np.ndarray, what: str) -> ImageSet:
    return replace(dataset.subset(np.sort(indices)), name=f"{dataset.name or 'images'} {what}")


def _folder(setup: Setup, path: str) -> ImageSet:
    channels, size, _ = setup.pixels
    folder = {
        "name": "image_folder",
        "dir": path,
        "partition": "iid",
        "classes": None,
        "class_names": None,
        "channels": channels,
        "size": size,
    }
    try:
        return tell(load_dataset(setup.config.data.model_copy(update=folder)))
    except ConfigError as error:
        raise ConfigError(
            f"evaluation.reference = {path!r} does not fit: its images must be of {size}x{size} "
            f"pixels, as the run's are, so convert the others. The folder is read as data.dir is: "
            f"{error}"
        ) from error
