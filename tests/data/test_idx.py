"""Fashion-MNIST and MNIST are read from wherever they usually lie, and damaged files are not."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data import load_dataset, named
from fed_diffusion.data.idx import Damaged, read_idx
from tests.data.test_torchvision_sets import noise, offline

__all__ = ["offline"]  # a fixture: every connection is refused


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write(folder: Path, n: int = 5, dot: str = "-", packed: bool = True) -> np.ndarray:
    """A training set of n images and a test set of 2; the training images are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", n), ("t10k", 2)):
        labels = np.arange(count, dtype=np.uint8)
        for kind, array in (
            ("images-idx3".replace("-", dot), noise(count, 28, 28, seed=count)),
            ("labels-idx1".replace("-", dot), labels),
        ):
            content = gzip.compress(idx(array), 1) if packed else idx(array)
            (folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}").write_bytes(content)
    return noise(n, 28, 28, seed=n)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder", "dot"),
    [
        ("fashion_mnist", ".", "-"),
        ("fashion_mnist", "raw", "-"),
        ("fashion_mnist", "FashionMNIST/raw", "-"),
        ("fashion_mnist", "fashion-mnist", "-"),
        ("mnist", ".", "."),
        ("mnist", "MNIST/raw", "-"),
        ("mnist", "mnist", "-"),
    ],
)
def test_every_usual_layout_is_read(
    name: str, folder: str, dot: str, packed: bool, tmp_path: Path
) -> None:
    pixels = write(tmp_path / folder, dot=dot, packed=packed)
    train = load_dataset(DataConfig(name=name, dir=str(tmp_path), size=28))
    test = load_dataset(DataConfig(name=name, dir=str(tmp_path)), "test")
    assert np.array_equal(train.images[:, 0].numpy(), pixels)
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    assert test.images.shape == (2, 1, 32, 32)
    assert train.notes == ()


def test_two_sets_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw", n=3)
    write(tmp_path / "FashionMNIST" / "raw", n=4)
    sizes = [len(load_dataset(DataConfig(name=name, dir=str(tmp_path)))) for name in named.FOLDERS]
    assert sizes == [4, 3]


def test_the_systems_package_is_found_by_itself_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(named.SYSTEM, "fashion_mnist", tmp_path / "system")
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        load_dataset(DataConfig(name="fashion_mnist"))
    write(tmp_path / "system")
    loaded = load_dataset(DataConfig(name="fashion_mnist"))
    assert loaded.notes == (f"fashion_mnist was read from {tmp_path / 'system'}.",)
    elsewhere = DataConfig(name="fashion_mnist", dir=str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"while data\.dir is not set"):
        load_dataset(elsewhere)  # what is named is meant
    path = tmp_path / "system" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="--reinstall dataset-fashion-mnist"):
        load_dataset(DataConfig(name="fashion_mnist"))


WHOLE = idx(noise(2, 28, 28))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file of bytes"),
        (b"<html>", "begins with 3c 68 74 6d"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "not an IDX file of bytes"),
        (WHOLE[:10], "its header counts"),
        (WHOLE[:-1], "counts 1568 bytes, and it has 1567"),
        (WHOLE + b"x", "counts 1568 bytes, and it has more"),
        (bytes([0, 0, 8, 2]) + b"\xff" * 8, "its header counts"),
        (gzip.compress(WHOLE)[:-4], "cannot be read"),
        (gzip.compress(WHOLE)[:-8] + bytes(8), "CRC"),
    ],
)
def test_a_file_of_another_structure_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=says) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "array", "says"),
    [
        ("labels-idx1", np.zeros(4, np.uint8), "not one label for each of the 5 images"),
        ("labels-idx1", np.full(5, 10, np.uint8), "the label 10"),
        ("images-idx3", noise(5, 28, 27), r"not images \[n, 28, 28\]"),
        ("images-idx3", noise(5, 784), r"not images \[n, 28, 28\]"),
    ],
)
def test_images_and_labels_that_do_not_belong_together_are_refused(
    file: str, array: np.ndarray, says: str, tmp_path: Path
) -> None:
    write(tmp_path, packed=False)
    (tmp_path / f"train-{file}-ubyte").write_bytes(idx(array))
    with pytest.raises(ConfigError, match=says):
        load_dataset(DataConfig(name="fashion_mnist", dir=str(tmp_path)))


# --- class folders


def write_classes(root: Path, names: tuple[str, ...], side: int = 32, mode: str = "RGB") -> None:
    from PIL import Image

    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new(mode, (side, side), (label,) * len(mode)).save(root / name / "a.png")


CIFAR10 = named.KNOWN["cifar10"].class_names
NUMBERS = tuple("0123456789")


@pytest.mark.parametrize("folder", [".", "cifar10", "train", "cifar10/train"])
@pytest.mark.parametrize("names", [CIFAR10, NUMBERS])
def test_class_folders_are_training_images_of_a_named_set(
    folder: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    write_classes(tmp_path / folder, names)
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    loaded = load_dataset(config)
    assert loaded.labels is not None
    assert loaded.images[:, 0, 0, 0].tolist() == loaded.labels.tolist() == list(range(10))
    assert (loaded.name, loaded.class_names) == ("cifar10", CIFAR10)
    with pytest.raises(ConfigError, match=r"no test images .*evaluation\.reference=train"):
        load_dataset(config, "test")


def test_train_and_test_folders_are_told_apart(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", CIFAR10)
    write_classes(tmp_path / "test", CIFAR10)
    (tmp_path / "test/bird/a.png").rename(tmp_path / "test/cat/b.png")
    (tmp_path / "test/bird/c.png").write_bytes((tmp_path / "test/cat/a.png").read_bytes())
    test = load_dataset(DataConfig(name="cifar10", dir=str(tmp_path)), "test")
    assert test.per_class()["cat"] == 2
    assert len(load_dataset(DataConfig(name="cifar10", dir=str(tmp_path)))) == 10


def test_class_folders_of_grey_sets_are_padded_like_their_files(tmp_path: Path) -> None:
    write_classes(tmp_path, NUMBERS, side=28, mode="L")
    assert load_dataset(DataConfig(name="mnist", dir=str(tmp_path))).images.shape[1:] == (1, 32, 32)


def test_a_named_set_without_one_of_its_class_folders_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, CIFAR10[:-1])
    with pytest.raises(ConfigError, match=r"none for truck\. Unpack the whole set"):
        load_dataset(DataConfig(name="cifar10", dir=str(tmp_path)))
