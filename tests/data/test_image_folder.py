"""Folders of image files: every layout is read in the order of names, every bad file is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data import ImageSet, load_dataset, partition


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
    parts = partition(loaded, data, 2, 0)
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
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.tif", "a.TIFF"])
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
    loaded = load_dataset(config(tmp_path, channels=3, background="white"))
    assert loaded.images.shape == (4, 3, 8, 8)


def test_a_transparent_image_is_refused_until_a_background_is_set(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.dstack([np.full((8, 8, 3), 9, np.uint8), noise(8, 8)]))
    save(tmp_path, "b.png", np.zeros((8, 8, 4), np.uint8))
    message = refused(config(tmp_path))
    assert "2 images of 2" in message
    assert "set it to white or black" in message
    for background, level in (("white", 255), ("black", 0)):
        loaded = load_dataset(config(tmp_path, background=background))
        assert (loaded.images[1] == level).all()


def test_files_that_are_not_read_are_counted_by_kind(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.gif", "D.GIF", "sub.avif"):
        save(tmp_path, name)
    for name in ("labels.csv", "LICENSE", "e.png.part"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "pipe.png")  # opened, it would wait for ever
    (note,) = load_dataset(config(tmp_path)).notes
    assert (
        "7 files beside the 2 images that were not read: 2 .gif, 1 .avif, 1 .csv, 1 .part" in note
    )
    assert "1 device or pipe, 1 without extension" in note
    assert "Images are read from .png, .jpg" in note


def test_a_folder_of_images_alone_has_nothing_to_tell(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    assert load_dataset(config(tmp_path)).notes == ()


def test_files_are_counted_in_class_and_client_folders_too(tmp_path: Path) -> None:
    for name in ("ann/cat/a.png", "ann/cat/b.gif", "bob/cat/a.png", "bob/c.gif", "d.gif"):
        save(tmp_path, name)
    (note,) = load_dataset(config(tmp_path, partition="folders")).notes
    assert "3 files beside the 2 images that were not read: 3 .gif" in note


SYSTEMS = (
    "@eaDir",
    "lost+found",
    "__MACOSX",
    "$RECYCLE.BIN",
    ".Trashes",
    "System Volume Information",
)


@pytest.mark.parametrize("kind", ["iid", "folders"])
def test_folders_that_systems_leave_are_neither_classes_nor_clients(
    kind: str, tmp_path: Path
) -> None:
    for name in ("cat/a.png", "dog/a.png", *(f"{system}/a.png" for system in SYSTEMS)):
        save(tmp_path, name)
    for system in SYSTEMS:
        save(tmp_path, f"dog/{system}/a.png")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "dog/Thumbs.db", "dog/._a.png"):
        (tmp_path / name).write_text("")
    loaded = load_dataset(config(tmp_path, partition=kind))
    assert len(loaded) == 2
    assert loaded.notes == ()
    assert loaded.class_names == (("cat", "dog") if kind == "iid" else None)
    assert loaded.folders == (("cat", "dog") if kind == "folders" else None)


def test_a_class_whose_name_begins_with_underscores_is_a_class(tmp_path: Path) -> None:
    save(tmp_path, "__none__/a.png")
    save(tmp_path, "cat/a.png")
    assert load_dataset(config(tmp_path)).class_names == ("__none__", "cat")


@pytest.mark.parametrize("kind", ["iid", "folders"])
def test_a_class_without_an_image_is_refused_with_what_is_there_instead(
    kind: str, tmp_path: Path
) -> None:
    root = tmp_path / "ann" if kind == "folders" else tmp_path
    save(root, "cat/a.png")
    (root / "bird").mkdir()
    assert "class folder 'bird' with no image in it" in refused(config(tmp_path, partition=kind))
    for i in range(3):
        save(root, f"bird/{i}.gif")
    assert "'bird' with no image in it (but 3 .gif)" in refused(config(tmp_path, partition=kind))


def test_a_client_need_not_have_images_of_every_class(tmp_path: Path) -> None:
    for name in ("ann/cat/a.png", "bob/cat/a.png", "bob/dog/a.png"):
        save(tmp_path, name)
    (tmp_path / "ann/dog").mkdir()
    loaded = load_dataset(config(tmp_path, partition="folders"))
    assert (loaded.class_names, labels(loaded)) == (("cat", "dog"), [0, 0, 1])


def test_two_spellings_of_an_accented_name_are_one_class(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    save(tmp_path, f"ann/{composed}/a.png")
    save(tmp_path, f"bob/{apart}/a.png")
    loaded = load_dataset(config(tmp_path, partition="folders"))
    assert (loaded.class_names, labels(loaded)) == ((composed,), [0, 0])


def test_class_names_number_the_classes(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        save(tmp_path, f"{name}/a.png")
    assert load_dataset(config(tmp_path)).class_names == ("1", "10", "2")
    loaded = load_dataset(config(tmp_path, class_names=["1", "2", "10"]))
    assert loaded.class_names == ("1", "2", "10")
    assert loaded.per_class() == {"1": 1, "2": 1, "10": 1}
    assert labels(loaded) == [0, 2, 1]  # the images stay in the order of the folders' names


def test_folders_and_class_names_that_differ_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "cat/a.png")
    save(tmp_path, "dog/a.png")
    assert "class folder 'dog', which is not in data.class_names = cat, fox" in refused(
        config(tmp_path, class_names=["cat", "fox"])
    )
    assert "no class folder 'fox'" in refused(config(tmp_path, class_names=["cat", "dog", "fox"]))
    assert "no class folder 'cat'" in refused(config(tmp_path / "cat", class_names=["cat"]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"class_names": ["cat", "cat"]}, "'cat' is given twice"),
        ({"class_names": ["cat", "dog"], "classes": 3}, "2 names for data.classes = 3"),
    ],
)
def test_class_names_that_contradict_are_refused(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **settings)


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
        message = refused(config(tmp_path, partition=kind))
        assert "holds no image of the kinds .png" in message
        assert "found 1 .gif: convert them" in message


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
