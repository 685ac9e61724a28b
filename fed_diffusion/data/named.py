"""Sets known by name: as they are published, as images in class folders, or downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fed_diffusion.common.caches import alone
from fed_diffusion.common.network import socket_timeout
from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data.decode import BadImage
from fed_diffusion.data.fit import fit
from fed_diffusion.data.idx import FOLDERS, PACKAGES, SYSTEM, Damaged, find, read_pair
from fed_diffusion.data.image_folder import read_folder
from fed_diffusion.data.image_set import ImageSet

DATA_DIR_VARIABLE = "FED_DIFFUSION_DATA"
DOWNLOAD_TIMEOUT_S = 15.0  # per connection and read, not for the whole file
TrainOrTest = Literal["train", "test"]
Pair = tuple[torch.Tensor, torch.Tensor]


class _Known(NamedTuple):
    channels: int
    sides: tuple[int, ...]
    """The sides that data.size may ask for, the default first and the published one last."""
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
    "mnist": _Known(1, (32, 28), _DIGITS),
}
DOWNLOADED = ("cifar10", "svhn", "fashion_mnist", "mnist")
"""The sets with a separate test split."""


def load_named(
    config: DataConfig, shape: tuple[int, int, int], split: TrainOrTest, own: bool
) -> ImageSet:
    """Return a set of `DOWNLOADED`: as published or downloaded, or from class folders as a last
    resort.

    The set is looked for below data.dir, else $FED_DIFFUSION_DATA, else ~/.cache/fed-diffusion.
    Where neither of the first two is set, the folder of the system's packages is searched too, and
    a note says so.
    """
    if config.side is None:
        config = config.model_copy(update={"pad": shape[1]})  # black, as the background is
    root = data_dir(config)
    notes: tuple[str, ...] = ()
    try:
        pair, problem = _published(config.name, root, split), "no such files"
    except Exception as error:  # absent, cut off or broken: torchvision raises anything
        pair, problem = None, _words(error)
    if pair is None and not (config.dir or os.environ.get(DATA_DIR_VARIABLE)):
        pair, notes = _of_the_system(config.name, split)
    if pair is None and (folders := _class_folders(config, root, split)):
        return _read_folders(config, shape, folders, own)
    if pair is None:
        pair = _downloaded(config, root, split, problem)
    images, labels = pair
    try:
        fitted = np.ascontiguousarray(fit(images.numpy(), config))
    except BadImage as error:
        raise ConfigError(f"data.name = {config.name!r}: each of its images {error}.") from error
    names = KNOWN[config.name].class_names
    return ImageSet(
        torch.from_numpy(fitted), labels, name=config.name, class_names=names, notes=notes
    )


def data_dir(config: DataConfig) -> Path:
    """Return where downloads go: data.dir, else $FED_DIFFUSION_DATA, else
    ~/.cache/fed-diffusion.
    """
    chosen = config.dir or os.environ.get(DATA_DIR_VARIABLE) or "~/.cache/fed-diffusion"
    return expanded(chosen, "data.dir")


def _published(name: str, root: Path, split: TrainOrTest) -> Pair | None:
    """Return the set in its published files; None, or an error, where they do not exist."""
    if name in FOLDERS:
        files = find(root, name, split)
        return None if files is None else _tensors(*read_pair(*files))
    # without a lock: md5 sums (or the reader) tell a file that is still being written
    return _torchvision(name, root, split, download=False)


def _tensors(images: np.ndarray, labels: np.ndarray) -> Pair:
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))


def _of_the_system(name: str, split: TrainOrTest) -> tuple[Pair | None, tuple[str, ...]]:
    """Return what a package of the system has installed, and a note that says where."""
    root = SYSTEM.get(name)
    files = None if root is None else find(root, name, split)
    if files is None:
        return None, ()
    try:
        return _tensors(*read_pair(*files)), (f"{name} was read from {root}.",)
    except Damaged as error:
        package = PACKAGES[name]
        raise ConfigError(
            f"data.name = {name!r}: {error}. Install it again (apt-get install --reinstall "
            f"{package}), or set data.dir to the folder of another copy."
        ) from error


def _torchvision(name: str, root: Path, split: TrainOrTest, download: bool) -> Pair:
    """Load files whose md5 sums are checked before anything is unpickled."""
    from torchvision import datasets

    if name == "svhn":
        svhn = datasets.SVHN(root, split=split, download=download)
        images, labels = torch.from_numpy(np.ascontiguousarray(svhn.data)), svhn.labels
    else:
        if (root / "data_batch_1").is_file() and root.name == datasets.CIFAR10.base_folder:
            root = root.parent
        cifar = datasets.CIFAR10(root, train=split == "train", download=download)
        images, labels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2), cifar.targets
    return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)


# --- images in class folders


def _class_folders(config: DataConfig, root: Path, split: TrainOrTest) -> Path | None:
    """Return the folder whose sub-folders are the classes; without train/ and test/ all is
    training.

    Raises
    ------
    ConfigError
        There are class folders, and none of this split.
    """
    for base in (root, root / config.name):
        if _names(config.name, base / split):
            return base / split
        if split == "train" and _names(config.name, base):
            return base
        if _names(config.name, base) or _names(config.name, base / "train"):
            raise ConfigError(
                f"data.dir = {str(root)!r} has the training images of {config.name!r} in class "
                f"folders, and no test images (in {base / 'test'}). Put them there, or use "
                "evaluation.reference=train or data."
            )
    return None


def _names(name: str, folder: Path) -> tuple[str, ...]:
    """Return the classes' names or their numbers, whichever are the names of sub-folders here."""
    names = KNOWN[name].class_names
    numbers = tuple(map(str, range(len(names))))
    for kind in (names, numbers):
        if any((folder / one).is_dir() for one in kind):
            return kind
    return ()


def _read_folders(
    config: DataConfig, shape: tuple[int, int, int], folder: Path, own: bool
) -> ImageSet:
    names = _names(config.name, folder)
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing and not own:
        raise ConfigError(
            f"data.name = {config.name!r}: {folder} has images in class folders, and none for "
            f"{', '.join(missing)}. Unpack the whole set there, or use data.name=image_folder for "
            "a part of it."
        )
    changes = {"dir": str(folder), "class_names": names, "classes": None}
    found = read_folder(config.model_copy(update={**changes, "partition": "iid"}), shape, own)
    assert found.labels is not None
    return ImageSet(
        torch.from_numpy(found.images),
        torch.from_numpy(found.labels),
        name=config.name,
        class_names=KNOWN[config.name].class_names,
        notes=found.notes,
    )


# --- downloads


def _downloaded(config: DataConfig, root: Path, split: TrainOrTest, problem: str) -> Pair:
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / ".download.lock"), socket_timeout(DOWNLOAD_TIMEOUT_S):
            if config.name not in FOLDERS:
                return _torchvision(config.name, root, split, download=True)
            kind = datasets.MNIST if config.name == "mnist" else datasets.FashionMNIST
            kind(root, train=split == "train", download=True)
            pair = _published(config.name, root, split)
            assert pair is not None
            return pair
    except Exception as error:  # no network, no disk, another file in its place
        raise ConfigError(_by_hand(config, root, split, problem, error)) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _by_hand(config: DataConfig, root: Path, split: str, problem: str, error: Exception) -> str:
    """Return what went wrong, and which files to put where without a network."""
    old, wanted = _files(config.name, root, split)
    lines = "\n".join(f"  {url}  ->  {path}" for url, path in wanted)
    package = PACKAGES.get(config.name)
    debian = (
        f"On Debian and Ubuntu, `apt-get install {package}` puts the set where it is found while "
        "data.dir is not set.\n"
        if package
        else ""
    )
    return (
        f"data.name = {config.name!r}: its files are not in data.dir = {str(root)!r}, or are "
        f"damaged ({problem}), and the download failed ({_words(error)}).\n{debian}Delete {old} "
        f"if it is there and download by hand (archives are unpacked for you):\n{lines}\nOr set "
        f"data.dir, or the environment variable {DATA_DIR_VARIABLE}, to the folder that has them."
    )


def _files(name: str, root: Path, split: str) -> tuple[Path, list[tuple[str, Path]]]:
    """Return what to delete, and (address, file) of what to put there."""
    from torchvision import datasets

    if name == "svhn":
        url, filename, _ = datasets.SVHN.split_list[split]
        return root / filename, [(url, root / filename)]
    if name == "cifar10":
        cifar = datasets.CIFAR10
        return root / cifar.base_folder, [(cifar.url, root / cifar.filename)]
    kind: Any = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    old = root / kind.__name__ / "raw"
    return old, [(kind.mirrors[0] + file, old / file) for file, _ in kind.resources]
