"""MNIST's file format, IDX, and the places where such files usually lie.

Debian's packages compress the files anew, so their checksums differ. The structure is checked
instead: a file must have every byte that its header counts, and no other.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

MOST_BYTES = 2**30
"""A header that counts more bytes than this is taken for damaged."""
SYSTEM = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
"""The folder of a set that the system's package manager has installed."""
PACKAGES = {"fashion_mnist": "dataset-fashion-mnist"}
"""The names of Debian's and Ubuntu's packages."""
FOLDERS = {
    "fashion_mnist": ("", "raw", "FashionMNIST/raw", "fashion-mnist", "fashion_mnist"),
    "mnist": ("", "raw", "MNIST/raw", "mnist"),
}
"""The folders below data.dir that are searched; the third is torchvision's."""
_PREFIX = {"train": "train", "test": "t10k"}


class Damaged(ValueError):
    """A file is not what its name says; the message names the file."""


def find(root: Path, name: str, split: str) -> tuple[Path, Path] | None:
    """Return the files of images and labels of a split, in the first layout that has both."""
    for folder in FOLDERS[name]:
        images = _file(root / folder, f"{_PREFIX[split]}-images", "idx3")
        labels = _file(root / folder, f"{_PREFIX[split]}-labels", "idx1")
        if images is not None and labels is not None:
            return images, labels
    return None


def _file(folder: Path, stem: str, kind: str) -> Path | None:
    names = [f"{stem}{dot}{kind}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n, 28, 28] and labels uint8 [n] from 0 to 9.

    Raises
    ------
    Damaged
        A file is cut off or is something else, or the two do not belong together.
    """
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28) or not len(pixels):
        raise Damaged(f"{images} holds {list(pixels.shape)}, not images [n, 28, 28]")
    if numbers.shape != (len(pixels),):
        raise Damaged(
            f"{labels} holds {list(numbers.shape)}, not one label for each of the "
            f"{len(pixels)} images of {images.name}"
        )
    if numbers.max() > 9:
        raise Damaged(f"{labels} holds the label {numbers.max()}, and labels are 0 to 9")
    return pixels, numbers


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array in an IDX file, compressed with gzip or not.

    Raises
    ------
    Damaged
        The file cannot be read, or is no IDX file of bytes, or its length is not what it says.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not packed:
                return _array(path, raw)
            with gzip.GzipFile(fileobj=raw) as file:
                return _array(path, cast(BinaryIO, file))
    except (OSError, EOFError, zlib.error) as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _array(path: Path, file: BinaryIO) -> np.ndarray:
    magic = file.read(4)
    if magic[:3] != b"\0\0\x08" or len(magic) < 4 or not 1 <= magic[3] <= 4:
        raise Damaged(
            f"{path} is not an IDX file of bytes: it begins with {magic.hex(' ') or 'none'}"
        )
    sizes = file.read(4 * magic[3])
    shape = np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist()
    count = math.prod(shape)
    if len(shape) < magic[3] or count > MOST_BYTES:
        raise Damaged(f"{path} is damaged: its header counts {shape}")
    content = file.read(count + 1)
    if len(content) != count:
        what = "more" if len(content) > count else f"{len(content)}"
        raise Damaged(f"{path} is damaged: its header counts {count} bytes, and it has {what}")
    return np.frombuffer(content, np.uint8).reshape(shape)
