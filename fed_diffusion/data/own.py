"""A node's own images: the folder that its operator named, checked against what the run needs."""

from __future__ import annotations

from fed_diffusion.config import ConfigError
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data.datasets import ImageSet, class_count, image_shape, load_dataset, tell

FOLDER = "image_folder"


def load_own(data: DataConfig, conditional: bool, folder: str | None, name: str | None) -> ImageSet:
    """All images of this node: one client's, never a part of a shared set.

    Parameters
    ----------
    data, conditional
        The run's section `data` and its model.conditional: its image shape and, for a conditional
        network, its number of classes are what the node's images must have. With data.class_names
        a node has folders of some of these names; else classes are numbered in the order of their
        folders' names, and a node that lacks a class has an empty folder of that name.
    folder
        `data-dir` of the node: a folder of images, or where the named set's files are.
    name
        `dataset` of the node, as `data.name`; default: image_folder.

    Raises
    ------
    ConfigError
        What does not fit, and how to fix it.
    """
    channels, side, _ = image_shape(data)
    wanted = {
        "name": name or FOLDER,
        "dir": folder,
        "size": side,
        "channels": channels,
        "classes": class_count(data) if conditional else None,
        "class_names": data.class_names if conditional else None,
        "partition": "iid",
    }
    try:
        dataset = tell(load_dataset(data.model_copy(update=wanted), own=True))
    except ConfigError as error:
        raise ConfigError(
            f"This node's own data do not fit: {error} (This run trains on "
            f"{channels} x {side} x {side} images; data.dir and data.name are data-dir and dataset "
            "of the node config.)"
        ) from error
    if not len(dataset):
        raise ConfigError(f"This node's own data do not fit: {name} holds no image.")
    return dataset
