"""Folders of image files: every layout is read in the order of names, every bad file is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fed_diffusion.data import ImageSet, load_dataset, partition
from fed_diffusion.schema import Config, ConfigError, DataConfig


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(root: Path, name: str, pixels: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Save pixels [H, W] or [H, W, 3] (default 8x8 grey noise by name) below `root`."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(8, 8, seed=sum(name.encode())) if pixels is None else pixels
    Image.fromarray(pixels).save(path, **options)
    return pixels


def config(root: Path, **settings: Any) -> DataConfig:
    given = {"name": "image_folder", "dir": str(root), "size": 8, "channels": 1, **settings}
    return DataConfig.model_validate(given)


def refused(data: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_dataset(data)
    message = str(caught.value)
    assert f"data.dir = '{data.dir}'" in message
    return message


def labels(dataset: ImageSet) -> list[int]:
    assert dataset.labels is not None
    return dataset.labels.tolist()


def test_a_flat_folder_is_read_in_the_order_of_names_without_labels(tmp_path: Path) -> None:
    saved = [save(tmp_path, name) for name in ("c.png", "a.PNG", "b.bmp")]
    loaded = load_dataset(config(tmp_path))
    assert np.array_equal(loaded.images[:, 0].numpy(), np.stack([saved[1], saved[2], saved[0]]))
    assert (loaded.labels, loaded.folders, loaded.name) == (None, None, "image_folder")
    assert torch.equal(loaded.images, load_dataset(config(tmp_path), "test").images)


def test_class_folders_are_labels_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/1.png", "ant/9.png"):
        save(tmp_path, name)
    assert labels(load_dataset(config(tmp_path, classes=3))) == [0, 1, 1, 2]


def test_client_folders_are_clients_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("bob/1.png", "ann/1.png", "ann/2.png"):
        save(tmp_path, name)
    data = config(tmp_path, partition="folders")
    loaded = load_dataset(data)
    assert (loaded.folders, loaded.labels) == (("ann", "bob"), None)
    parts = partition(loaded, Config(clients=2, data=data))
    assert [part.tolist() for part in parts] == [[0, 1], [2]]


def test_classes_within_client_folders_are_numbered_over_all_clients(tmp_path: Path) -> None:
    for name in ("ann/dog/1.png", "bob/cat/1.png", "bob/dog/1.png"):
        save(tmp_path, name)
    loaded = load_dataset(config(tmp_path, partition="folders"))
    assert labels(loaded) == [1, 0, 1]
    assert loaded.folder_of is not None
    assert loaded.folder_of.tolist() == [0, 1, 1]


def test_hidden_entries_and_other_files_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    save(tmp_path, "moving.gif")
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".git").mkdir()
    assert len(load_dataset(config(tmp_path))) == 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp"])
def test_every_format_is_read_as_pil_reads_it(
    channels: int, mode: str, name: str, tmp_path: Path
) -> None:
    save(tmp_path, name, noise(8, 8, 3))
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert(mode)).reshape(8, 8, channels).transpose(2, 0, 1)
    loaded = load_dataset(config(tmp_path, channels=channels))
    assert np.array_equal(loaded.images[0].numpy(), expected)


def test_grey_transparent_and_palette_files_mix_with_colour(tmp_path: Path) -> None:
    save(tmp_path, "colour.png", noise(8, 8, 3))
    save(tmp_path, "grey.png")
    save(tmp_path, "transparent.png", noise(8, 8, 4))
    Image.fromarray(noise(8, 8, 3)).quantize(16).save(tmp_path / "palette.png")
    assert load_dataset(config(tmp_path, channels=3)).images.shape == (4, 3, 8, 8)


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    for i in range(700):
        save(tmp_path, f"{i:03d}.png", np.full((8, 8), i % 256, dtype=np.uint8))
    loaded = load_dataset(config(tmp_path))
    assert loaded.images[:, 0, 3, 3].tolist() == [i % 256 for i in range(700)]


def test_images_of_another_size_are_named_with_theirs_and_the_expected(tmp_path: Path) -> None:
    save(tmp_path, "right.png")
    save(tmp_path, "large.png", noise(28, 28))
    save(tmp_path, "wide.png", noise(8, 10))
    message = refused(config(tmp_path))
    assert "2 images of 3" in message
    assert "large.png is 28x28 pixels" in message
    assert "wide.png is 10x8 pixels" in message
    assert "right.png" not in message
    assert "8x8" in message
    assert "data.size" in message


def test_broken_files_are_counted_and_five_of_them_named(tmp_path: Path) -> None:
    save(tmp_path, "whole.png")
    for i in range(4):
        (tmp_path / f"empty{i}.png").write_bytes(b"")
    save(tmp_path, "cut.jpg", noise(8, 8))
    save(tmp_path, "cut.png", noise(8, 8))
    for name in ("cut.jpg", "cut.png"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: -len(data) // 4])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refused(config(tmp_path))
    assert "7 images of 8" in message
    assert message.count("cannot be read") == 5
    assert "and 2 more" in message
    assert "cut.jpg" in message
    assert "cut.png" in message


def test_images_of_16_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert "deep.png has more than 8 bits per channel" in refused(config(tmp_path))


def test_a_folder_that_is_not_set_or_not_there_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(config(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(config(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data\.dir is not set"):
        load_dataset(config(tmp_path, dir=None))


def test_a_folder_without_images_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    save(tmp_path, "moving.gif")
    for kind in ("iid", "folders"):
        assert "holds no image; looked for .png" in refused(config(tmp_path, partition=kind))


@pytest.mark.parametrize(
    ("files", "kind", "complaint"),
    [
        (["a.png", "cat/b.png"], "iid", "side by side"),
        (["ann/cat/a.png"], "iid", "set data.partition = 'folders'"),
        (["ann/cat/deep/a.png"], "folders", "one level too deep at 'ann/cat/deep'"),
        (["a.png", "ann/b.png"], "folders", "holds 'a.png' beside the client folders"),
        (["ann/a.png", "bob/b.gif"], "folders", "client folder 'bob' with no image"),
        (["ann/cat/a.png", "bob/b.png"], "folders", "none in 'bob'"),
    ],
)
def test_a_layout_that_cannot_be_understood_is_refused(
    files: list[str], kind: str, complaint: str, tmp_path: Path
) -> None:
    for name in files:
        save(tmp_path, name)
    assert complaint in refused(config(tmp_path, partition=kind))


def test_a_number_of_classes_other_than_the_folders_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "cat/a.png")
    save(tmp_path, "dog/a.png")
    assert "has 2 class folders, but data.classes = 3" in refused(config(tmp_path, classes=3))
    assert "has no class folders" in refused(config(tmp_path / "cat", classes=3))
