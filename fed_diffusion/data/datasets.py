"""Sets of images: the embedded digits, the torchvision sets, a folder, or a function of the user.

All images are kept as uint8 [n, C, H, W]; `to_unit` brings a batch to the range [-1, 1] that
networks see.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.names import refuse_unknown
from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.config.section import HUB
from fed_diffusion.data.decode import BadImage
from fed_diffusion.data.fit import HOW, fit
from fed_diffusion.data.hub import has_test, load_hub
from fed_diffusion.data.image_folder import WITHOUT_CLASSES, read_folder
from fed_diffusion.data.image_set import ImageSet as ImageSet
from fed_diffusion.data.named import DOWNLOADED as DOWNLOADED
from fed_diffusion.data.named import KNOWN as KNOWN
from fed_diffusion.data.named import TrainOrTest, load_named
from fed_diffusion.data.named import data_dir as data_dir

logger = logging.getLogger(__name__)
Loaded = ImageSet | tuple[Any, Any]


class Loader(Protocol):
    """What data.name names: a function that loads images.

    Parameters
    ----------
    config
        The section `data` of the configuration: size and channels are what the images must have,
        dir is where they may lie.

    Returns
    -------
    ImageSet, or (images, labels)
        Images uint8 [n, C, H, W] with values 0 to 255; labels whole numbers [n] from 0, or None;
        as tensors or arrays. Every process of a run loads the same images in the same order.
    """

    def __call__(self, config: DataConfig, /) -> Loaded: ...


def content_hash(dataset: ImageSet, captions: bool = False) -> str:
    """Return SHA-256 over the images' shape and bytes, labels, client folders and, where a run
    trains on them, captions.
    """
    digest = hashlib.sha256(repr(tuple(dataset.images.shape)).encode())
    digest.update(dataset.images.contiguous().numpy().data)
    if dataset.labels is not None:
        digest.update(dataset.labels.contiguous().numpy().data)
    if dataset.folder_of is not None:
        digest.update(repr(dataset.folders).encode())
        digest.update(dataset.folder_of.contiguous().numpy().data)
    if captions and dataset.captions is not None:
        digest.update(repr(dataset.captions).encode())
    return digest.hexdigest()


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Return values in [-1, 1] rounded to uint8 and clamped; this undoes `to_unit` exactly."""
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_shape(config: DataConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of the images, without loading any.

    Raises
    ------
    ConfigError
        Where data.size or data.channels is missing (image_folder, your own function) or is not
        what the named set has, or where data.name is unknown. The size may be said by data.pad,
        data.resize or data.crop.
    """
    known = KNOWN.get(config.name)
    if known is not None:
        _check_known(config, "channels", (known.channels,))
        if config.side is None:
            _check_known(config, "size", known.sides)
        given = config.side or config.size or known.sides[0]
        return known.channels, given, given
    _refuse_unknown(config.name)
    side = config.side or config.size
    if side is None:
        raise ConfigError(
            f"data.size is not set; data.name = {config.name!r} needs it: the side of your images "
            f"in pixels. Where they are of other sizes, {HOW}."
        )
    if config.channels is None:
        raise ConfigError(
            f"data.channels is not set; data.name = {config.name!r} needs it: 1 (grey) or 3 (RGB)."
        )
    return config.channels, side, side


def class_count(config: DataConfig) -> int | None:
    """Return the number of classes, without loading images: the named set's, or the configured
    one.
    """
    given = config.classes if config.class_names is None else len(config.class_names)
    known = KNOWN.get(config.name)
    if known is None:
        _refuse_unknown(config.name)
        return given
    _check_known(config, "classes", (known.classes,), given)
    return known.classes


def _check_known(
    config: DataConfig, key: str, allowed: tuple[int, ...], given: int | None = None
) -> None:
    value = getattr(config, key) if given is None else given
    if value is not None and value not in allowed:
        raise ConfigError(
            f"data.{key} = {value} contradicts data.name = {config.name!r}, which has "
            f"{' or '.join(map(str, allowed))}. Leave data.{key} unset"
            f"{', or set data.resize or data.pad' if key == 'size' else ''}."
        )


def load_dataset(
    config: DataConfig, split: TrainOrTest = "train", *, own: bool = False
) -> ImageSet:
    """Load the images that `config` names; the torchvision sets are downloaded on first use.

    digits, image_folder and a function of the user's own (see `Loader`) have one split only:
    "test" gives the same images as "train".

    Parameters
    ----------
    own
        The images are one client's of several, which need not have some of every class.

    Raises
    ------
    ConfigError
        The message names the key, what was found, what is expected and how to fix it.
    """
    shape, classes = image_shape(config), class_count(config)
    if config.name.startswith(HUB):
        dataset = load_hub(config, shape, split, own)
        _check_labels(f"data.name = {config.name!r}", dataset, classes)
        return dataset
    found = resolve("data.name", config.name, LOADERS)
    if config.name in LOADERS:
        dataset = found(config, shape, split, own)
    else:
        dataset = _load_own(found, config, shape, classes)
    if config.name == "image_folder" or config.class_names is None or dataset.labels is None:
        return dataset
    return replace(dataset, class_names=config.class_names)


def has_test_split(config: DataConfig) -> bool:
    """Whether a set has test images of its own, which `load_dataset(config, "test")` gives."""
    if config.name.startswith(HUB):
        return has_test(config)
    return config.name in DOWNLOADED


def _refuse_unknown(name: str) -> None:
    if not name.startswith(HUB):
        refuse_unknown("data.name", name, (*LOADERS, f"{HUB}NAME-OR-PATH"))


def tell(dataset: ImageSet) -> ImageSet:
    """Warn of what loading left out; only the process that speaks to the user calls this."""
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset


def named_classes(data: DataConfig, dataset: ImageSet | None) -> DataConfig:
    """The settings with the names of an image folder's classes, or of a set of datasets', as they
    are numbered.
    """
    if dataset is None or dataset.class_names is None:
        return data
    if data.name != "image_folder" and not data.name.startswith(HUB):
        return data
    return data.model_copy(update={"class_names": dataset.class_names})


def _load_folder(
    config: DataConfig, shape: tuple[int, int, int], split: TrainOrTest, own: bool
) -> ImageSet:
    found = read_folder(config, shape, own)
    return ImageSet(
        images=torch.from_numpy(found.images),
        labels=None if found.labels is None else torch.from_numpy(found.labels),
        folders=found.folders,
        folder_of=None if found.folder_of is None else torch.from_numpy(found.folder_of),
        name=config.name,
        class_names=found.class_names,
        notes=found.notes,
        captions=found.captions,
    )


def _load_digits(
    config: DataConfig, shape: tuple[int, int, int], split: TrainOrTest, own: bool
) -> ImageSet:
    """Return all 1,797 digits; their 17 grey levels 0..16 are spread over 0..255."""
    if config.dir is not None:
        raise ConfigError(
            f"data.dir = {config.dir!r} would not be read, since data.name = 'digits' comes with "
            "the package. For a folder of your own images take the preset photos, or set "
            "data.name=image_folder, data.size and data.channels."
        )
    # scikit-learn's own file, of 64 values and a label in each line: its import takes seconds
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    lines = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    grey = lines[:, :-1].reshape(-1, 1, 8, 8)
    images = fit(np.round(grey * 255 / 16).astype(np.uint8), config)
    labels = lines[:, -1].astype(np.int64)
    names = KNOWN["digits"].class_names
    return ImageSet(
        torch.from_numpy(images), torch.from_numpy(labels), name="digits", class_names=names
    )


LOADERS: dict[str, Callable[[DataConfig, tuple[int, int, int], TrainOrTest, bool], ImageSet]] = {
    "digits": _load_digits,
    **dict.fromkeys(DOWNLOADED, load_named),
    "image_folder": _load_folder,
}
"""The built-in sets: a function of (config, [C, H, W], split, whether one client owns the
images).
"""


def _load_own(
    load: Loader, config: DataConfig, shape: tuple[int, int, int], classes: int | None
) -> ImageSet:
    key = f"data.name = {config.name!r}"
    with blamed("data.name", config.name):
        result = load(config)
    try:
        dataset = _as_image_set(result, config.name)
        if config.crop is not None or config.side is not None:
            fitted = fit(dataset.images.numpy(), config)
            dataset = replace(dataset, images=torch.from_numpy(np.ascontiguousarray(fitted)))
    except BadImage as error:
        raise ConfigError(f"{key} returns images of which each {error}.") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} returns something that cannot be used: {error}.") from error
    found = tuple(dataset.images.shape[1:])
    if found != shape:
        raise ConfigError(
            f"{key} returns images of [C, H, W] = {list(found)}, but data.channels = {shape[0]} "
            f"and data.size = {shape[1]}. Change one to match the other, or have the run change "
            f"the size: {HOW}."
        )
    _check_labels(key, dataset, classes)
    return dataset


def _check_labels(key: str, dataset: ImageSet, classes: int | None) -> None:
    if classes is not None and len(dataset):
        if dataset.labels is None:
            raise ConfigError(
                f"{key} has no labels, but data.classes = {classes}; {WITHOUT_CLASSES} and "
                "data.classes=null."
            )
        if int(dataset.labels.max()) >= classes:
            raise ConfigError(
                f"{key} has the label {int(dataset.labels.max())}, but data.classes = "
                f"{classes} allows 0 to {classes - 1}."
            )


def _as_image_set(result: Any, name: str) -> ImageSet:
    if isinstance(result, ImageSet):
        return result
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "expected an ImageSet or a tuple (images uint8 [n, C, H, W], labels or None), got "
            f"{type(result).__name__}"
        )
    images, labels = result
    if labels is not None:
        labels = _as_tensor(labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, not {labels.dtype}")
        labels = labels.to(torch.int64)
    return ImageSet(_as_tensor(images), labels, name=name)


def _as_tensor(values: Any) -> torch.Tensor:
    """Return a tensor on the CPU; arrays that torch cannot wrap (reversed, read-only) are
    copied.
    """
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().contiguous()
    return torch.from_numpy(np.require(np.asarray(values), requirements=["C", "W"]))
