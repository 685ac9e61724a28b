"""Sets of images: the embedded digits, the torchvision sets, a folder, or a function of your own.

Everything is kept as uint8 [n, C, H, W]; `to_unit` brings a batch to the [-1, 1] that networks see.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.names import refuse_unknown
from fed_diffusion.config.schema import Config, ConfigError, DataConfig
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data.image_folder import read_folder
from fed_diffusion.data.image_set import ImageSet as ImageSet

logger = logging.getLogger(__name__)
DATA_DIR_VARIABLE = "FED_DIFFUSION_DATA"
DOWNLOAD_TIMEOUT_S = 15.0  # per connection and read, not for the whole file


TrainOrTest = Literal["train", "test"]
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


class _Known(NamedTuple):
    channels: int
    sides: tuple[int, ...]
    """Sides that data.size may ask for, the default first."""
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)


_DIGITS = tuple("0123456789")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
# 28 pixels halve only twice; padded to 32 they pass through U-Nets of any usual depth
KNOWN = {
    "digits": _Known(1, (8,), _DIGITS),
    "cifar10": _Known(3, (32,), tuple(_CIFAR10.split())),
    "svhn": _Known(3, (32,), _DIGITS),
    "fashion_mnist": _Known(1, (32, 28), tuple(_FASHION.split(","))),
}
DOWNLOADED = ("cifar10", "svhn", "fashion_mnist")
"""Sets with a test split of their own."""


def content_hash(dataset: ImageSet) -> str:
    """SHA-256 over the images' shape and bytes, their labels and their client folders."""
    digest = hashlib.sha256(repr(tuple(dataset.images.shape)).encode())
    digest.update(dataset.images.contiguous().numpy().data)
    if dataset.labels is not None:
        digest.update(dataset.labels.contiguous().numpy().data)
    if dataset.folder_of is not None:
        digest.update(repr(dataset.folders).encode())
        digest.update(dataset.folder_of.contiguous().numpy().data)
    return digest.hexdigest()


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] rounded to uint8, those outside clamped; undoes `to_unit` exactly."""
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_shape(config: DataConfig) -> tuple[int, int, int]:
    """(C, H, W) of the images, without loading any.

    Raises
    ------
    ConfigError
        Where data.size or data.channels is missing (image_folder, your own function) or is not
        what the named set has, or where data.name is unknown.
    """
    known = KNOWN.get(config.name)
    if known is not None:
        _check_known(config, "channels", (known.channels,))
        _check_known(config, "size", known.sides)
        side = config.size or known.sides[0]
        return known.channels, side, side
    refuse_unknown("data.name", config.name, LOADERS)
    for key, value in (("size", config.size), ("channels", config.channels)):
        if value is None:
            what = "the side of your images in pixels" if key == "size" else "1 (grey) or 3 (RGB)"
            raise ConfigError(
                f"data.{key} is not set; data.name = {config.name!r} needs it: {what}."
            )
    assert config.size is not None
    assert config.channels is not None
    return config.channels, config.size, config.size


def class_count(config: DataConfig) -> int | None:
    """Number of classes, without loading the images: the named set's, or what the config says."""
    given = config.classes if config.class_names is None else len(config.class_names)
    known = KNOWN.get(config.name)
    if known is None:
        refuse_unknown("data.name", config.name, LOADERS)
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
            f"{' or '.join(map(str, allowed))}. Leave data.{key} unset."
        )


def data_dir(config: DataConfig) -> Path:
    """Where downloads go: data.dir, else $FED_DIFFUSION_DATA, else ~/.cache/fed-diffusion."""
    chosen = config.dir or os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/fed-diffusion"
    return expanded(chosen, "data.dir")


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
        Names the key, what was found, what is expected and how to fix it.
    """
    shape, classes = image_shape(config), class_count(config)
    found = resolve("data.name", config.name, LOADERS)
    if config.name in LOADERS:
        dataset: ImageSet = found(config, shape, split, own)
    else:
        dataset = _load_own(found, config, shape, classes)
    if config.name == "image_folder" or config.class_names is None or dataset.labels is None:
        return dataset
    return replace(dataset, class_names=config.class_names)


def tell(dataset: ImageSet) -> ImageSet:
    """Warn of what loading left out; for the one process of several that speaks to the user."""
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset


def with_class_names(config: Config, dataset: ImageSet | None) -> Config:
    """The configuration with the names of an image folder's classes, as they are numbered.

    So a run's record says them, a resumed run finds that they are the same still, and nodes with
    folders of their own number their classes alike.
    """
    data = config.data
    if dataset is None or dataset.class_names is None or data.name != "image_folder":
        return config
    data = data.model_copy(update={"class_names": dataset.class_names})
    return config.model_copy(update={"data": data})


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
    )


def _load_digits(
    config: DataConfig, shape: tuple[int, int, int], split: TrainOrTest, own: bool
) -> ImageSet:
    """All 1,797 digits; their 17 grey levels 0..16 are spread over 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    names = KNOWN["digits"].class_names
    return ImageSet(
        torch.from_numpy(images), torch.from_numpy(labels), name="digits", class_names=names
    )


def _load_torchvision(
    config: DataConfig, shape: tuple[int, int, int], split: TrainOrTest, own: bool
) -> ImageSet:
    root = data_dir(config)
    try:
        # without a lock: md5 sums (or the reader) tell a file that is still being written
        images, labels = _open_torchvision(config.name, root, split, download=False)
    except Exception:  # absent, cut off or broken: torchvision raises anything from its readers
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _alone_in(root), _socket_timeout(DOWNLOAD_TIMEOUT_S):
                images, labels = _open_torchvision(config.name, root, split, download=True)
        except Exception as error:
            raise ConfigError(_by_hand(config, root, split, error)) from error
    border = (shape[2] - images.shape[3]) // 2
    images = torch.nn.functional.pad(images, (border,) * 4)  # black, as the background is
    return ImageSet(images, labels, name=config.name, class_names=KNOWN[config.name].class_names)


def _open_torchvision(
    name: str, root: Path, split: TrainOrTest, download: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from torchvision import datasets

    if name == "svhn":
        svhn = datasets.SVHN(root, split=split, download=download)
        images, labels = torch.from_numpy(np.ascontiguousarray(svhn.data)), svhn.labels
    elif name == "cifar10":
        cifar = datasets.CIFAR10(root, train=split == "train", download=download)
        images, labels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2), cifar.targets
    else:
        fashion = datasets.FashionMNIST(root, train=split == "train", download=download)
        images, labels = fashion.data[:, None], fashion.targets
    return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


def _by_hand(config: DataConfig, root: Path, split: str, error: Exception) -> str:
    """What went wrong, and which files to put where without a network."""
    from torchvision import datasets

    if config.name == "svhn":
        url, filename, _ = datasets.SVHN.split_list[split]
        old, wanted = root / filename, [(url, root / filename)]
    elif config.name == "cifar10":
        cifar = datasets.CIFAR10
        old, wanted = root / cifar.base_folder, [(cifar.url, root / cifar.filename)]
    else:
        fashion = datasets.FashionMNIST
        old = root / "FashionMNIST" / "raw"
        wanted = [(fashion.mirrors[0] + name, old / name) for name, _ in fashion.resources]
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = "\n".join(f"  {url}  ->  {path}" for url, path in wanted)
    return (
        f"data.name = {config.name!r}: its files are not in data.dir = {str(root)!r}, or are "
        f"damaged, and the download failed ({reason}).\nDelete {old} if it is there and download "
        f"by hand (archives are unpacked for you):\n{lines}\nOr set data.dir, or the environment "
        f"variable {DATA_DIR_VARIABLE}, to the folder that has them."
    )


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A silent server ends in an error; torchvision itself sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time downloads; the others wait and find the files."""
    with (folder / ".download.lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # no such locks on this system or file system: do without
        yield


LOADERS: dict[str, Callable[[DataConfig, tuple[int, int, int], TrainOrTest, bool], ImageSet]] = {
    "digits": _load_digits,
    **dict.fromkeys(DOWNLOADED, _load_torchvision),
    "image_folder": _load_folder,
}
"""The built-in sets: (config, [C, H, W], split, whether they are one client's own) -> images."""


def _load_own(
    load: Loader, config: DataConfig, shape: tuple[int, int, int], classes: int | None
) -> ImageSet:
    key = f"data.name = {config.name!r}"
    with blamed("data.name", config.name):
        result = load(config)
    try:
        dataset = _as_image_set(result, config.name)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} gives what cannot be used: {error}.") from error
    found = tuple(dataset.images.shape[1:])
    if found != shape:
        raise ConfigError(
            f"{key} gives images of [C, H, W] = {list(found)}, but data.channels = {shape[0]} and "
            f"data.size = {shape[1]}. Change one to match the other."
        )
    if classes is not None and len(dataset):
        if dataset.labels is None:
            raise ConfigError(f"{key} gives no labels, but data.classes = {classes}.")
        if int(dataset.labels.max()) >= classes:
            raise ConfigError(
                f"{key} gives the label {int(dataset.labels.max())}, but data.classes = {classes} "
                f"allows 0 to {classes - 1}."
            )
    return dataset


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
    """A tensor on the CPU; arrays torch cannot wrap (reversed, read-only) are copied."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().contiguous()
    return torch.from_numpy(np.require(np.asarray(values), requirements=["C", "W"]))
