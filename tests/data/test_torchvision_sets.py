"""Downloaded sets in their true file formats, and what is said where there is no network."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import re
import socket
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data import load_dataset, named

DOWNLOADED = ("cifar10", "svhn", "fashion_mnist", "mnist")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(config: DataConfig) -> str:
    """The message with which `config` is refused."""
    with pytest.raises(ConfigError) as caught:
        load_dataset(config)
    return str(caught.value)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is refused at once."""
    monkeypatch.setattr(
        urllib.request, "_opener", None
    )  # it remembers the proxies of its first use
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", named.DATA_DIR_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = {}
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        pixels[name] = noise(2, 3072, seed=i)
        content = {"data": pixels[name], "labels": [i, 9 - i]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    names = [f"data_batch_{k}" for k in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(folder / n)] for n in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = {**CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return pixels


def test_cifar10_images_are_those_of_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    train, test = load_dataset(config), load_dataset(config, "test")
    expected = np.concatenate([pixels[f"data_batch_{k}"] for k in range(1, 6)])
    assert np.array_equal(train.images.numpy(), expected.reshape(10, 3, 32, 32))
    assert np.array_equal(test.images.numpy(), pixels["test_batch"].reshape(2, 3, 32, 32))
    assert train.labels is not None
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert train.name == "cifar10"


def test_a_cifar10_archive_put_there_by_hand_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path / "made", monkeypatch)
    archive = tmp_path / "here" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    assert len(load_dataset(DataConfig(name="cifar10", dir=str(archive.parent)))) == 10


def write_svhn(path: Path, pixels: np.ndarray) -> None:
    from scipy.io import savemat

    stored = pixels.transpose(2, 3, 1, 0)  # [H, W, C, n]
    savemat(path, {"X": stored, "y": np.array([[10], [1], [9], [10], [3]], dtype=np.uint8)})


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_images_are_turned_upright_and_ten_means_zero(
    split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import SVHN

    pixels = noise(5, 3, 32, 32)
    path = tmp_path / f"{split}_32x32.mat"
    write_svhn(path, pixels)
    monkeypatch.setattr(SVHN, "split_list", {split: ["http://x/", path.name, md5(path)]})
    loaded = load_dataset(DataConfig(name="svhn", dir=str(tmp_path)), split)
    assert np.array_equal(loaded.images.numpy(), pixels)
    assert loaded.images.is_contiguous()
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [0, 1, 9, 0, 3]


def write_fashion(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The four .gz files as they are downloaded; the training images are returned."""
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for prefix, n in (("train", 6), ("t10k", 2)):
        pixels, labels = noise(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            path = raw / f"{prefix}-{kind}-ubyte.gz"
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            path.write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return noise(6, 28, 28, seed=6)


def test_fashion_mnist_is_unpacked_and_gets_a_black_border(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_fashion(tmp_path, monkeypatch)
    padded = load_dataset(DataConfig(name="fashion_mnist", dir=str(tmp_path)))
    native = load_dataset(DataConfig(name="fashion_mnist", dir=str(tmp_path), size=28))
    test = load_dataset(DataConfig(name="fashion_mnist", dir=str(tmp_path)), "test")
    assert padded.images.shape == (6, 1, 32, 32)
    assert np.array_equal(native.images[:, 0].numpy(), pixels)
    assert torch.equal(padded.images[:, :, 2:-2, 2:-2], native.images)
    assert padded.images.sum() == native.images.sum()
    assert padded.labels is not None
    assert padded.labels.tolist() == list(range(6))
    assert len(test) == 2


def test_the_environment_moves_the_default_folder_but_not_one_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion(tmp_path, monkeypatch)
    monkeypatch.setenv(named.DATA_DIR_VARIABLE, str(tmp_path))
    assert len(load_dataset(DataConfig(name="fashion_mnist"))) == 6
    other = tmp_path / "other"
    assert str(other) in refused(DataConfig(name="fashion_mnist", dir=str(other)))


# --- downloads that fail

BY_HAND = {
    "cifar10": ["cifar-10-python.tar.gz"],
    "svhn": ["train_32x32.mat"],
} | {
    name: [
        f"{folder}/raw/{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    for name, folder in (("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST"))
}


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_failed_download_names_the_folder_and_every_file_to_put_there(
    name: str, tmp_path: Path
) -> None:
    message = refused(DataConfig(name=name, dir=str(tmp_path)))
    assert f"data.name = '{name}'" in message
    assert f"data.dir = '{tmp_path}'" in message
    assert "refused" in message
    for file in BY_HAND[name]:
        assert re.search(rf"http\S+{Path(file).name}  ->  {tmp_path / file}\n", message)


def test_a_damaged_file_is_refused_rather_than_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion(tmp_path, monkeypatch)
    config = DataConfig(name="fashion_mnist", dir=str(tmp_path))
    load_dataset(config)
    raw = tmp_path / "FashionMNIST" / "raw"
    whole = (raw / "train-images-idx3-ubyte.gz").read_bytes()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(whole[:-100])
    message = refused(config)
    assert f"Delete {raw} if it is there" in message
    assert "train-images-idx3-ubyte.gz cannot be read" in message


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_file_with_another_checksum_is_refused_though_it_could_be_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets as torchvision

    if name == "cifar10":
        write_cifar10(tmp_path, monkeypatch)
        path = tmp_path / torchvision.CIFAR10.base_folder / "data_batch_3"
        other = pickle.dumps({"data": noise(2, 3072, seed=9), "labels": [1, 2]})
    else:
        path = tmp_path / "train_32x32.mat"
        write_svhn(path, noise(5, 3, 32, 32))
        split = {"train": ["http://x/", path.name, md5(path)]}
        monkeypatch.setattr(torchvision.SVHN, "split_list", split)
        write_svhn(tmp_path / "other.mat", noise(5, 3, 32, 32, seed=1))
        other = (tmp_path / "other.mat").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(other)
    assert "by hand" in refused(DataConfig(name=name, dir=str(tmp_path)))
    path.write_bytes(whole)
    assert len(load_dataset(DataConfig(name=name, dir=str(tmp_path)))) > 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert f"data.dir = '{tmp_path / 'file'}'" in refused(
        DataConfig(name="svhn", dir=str(tmp_path / "file"))
    )


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    kept.append(server.accept()[0])
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_server_that_says_nothing_does_not_hang_the_run(
    name: str, silent_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{silent_server}")
    monkeypatch.setattr(named, "DOWNLOAD_TIMEOUT_S", 0.1)
    before = socket.getdefaulttimeout()
    assert "timed out" in refused(DataConfig(name=name, dir=str(tmp_path)))
    assert socket.getdefaulttimeout() == before
