"""Data sets: what is loaded is what the files hold, and what cannot be used is refused in words."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fed_diffusion.config import load_config
from fed_diffusion.config.schema import ConfigError, DataConfig
from fed_diffusion.data import (
    ImageSet,
    class_count,
    image_shape,
    load_dataset,
    partition,
    to_uint8,
    to_unit,
)

NAMED = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "svhn": (3, 32, 32)}


def refused(config: DataConfig) -> str:
    """The message with which `config` is refused."""
    with pytest.raises(ConfigError) as caught:
        load_dataset(config)
    return str(caught.value)


# --- values, shapes, ImageSet


def test_uint8_survives_the_way_to_unit_and_back() -> None:
    x = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(x)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(to_uint8(unit), x)


def test_values_outside_the_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0, 128, 255]


def test_a_subset_keeps_labels_and_folders_in_the_given_order() -> None:
    images = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
    whole = ImageSet(images, torch.tensor([5, 6, 7]), ("a", "b"), torch.tensor([0, 1, 1]), "x")
    for indices in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        part = whole.subset(indices)
        assert torch.equal(part.images, images[[2, 0]])
        assert part.labels is not None
        assert part.folder_of is not None
        assert (part.labels.tolist(), part.folder_of.tolist()) == ([7, 5], [1, 0])
        assert (part.folders, part.name, len(part)) == (("a", "b"), "x", 2)
    assert len(whole.subset([])) == 0


BLANK = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"images": BLANK.float()}, "images must be uint8"),
        ({"images": BLANK[0]}, "images must be uint8"),
        ({"images": BLANK, "labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64"),
        ({"images": BLANK, "labels": torch.zeros(2)}, "labels must be int64"),
        ({"images": BLANK, "labels": torch.tensor([0, -1])}, "labels must count from 0"),
        ({"images": BLANK, "folders": ("a",)}, "given together"),
        (
            {"images": BLANK, "folders": ("a",), "folder_of": torch.tensor([0, 1])},
            "folder_of must count from 0 to 0",
        ),
    ],
)
def test_an_image_set_of_wrong_types_or_lengths_is_refused(
    given: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImageSet(**given)


@pytest.mark.parametrize(("name", "shape"), NAMED.items())
def test_named_sets_know_their_shape_and_classes(name: str, shape: tuple[int, int, int]) -> None:
    assert image_shape(DataConfig(name=name)) == shape
    assert image_shape(DataConfig(name=name, size=shape[1], channels=shape[0])) == shape
    assert class_count(DataConfig(name=name, classes=10)) == 10


def test_fashion_mnist_is_padded_to_32_unless_28_is_asked_for() -> None:
    assert image_shape(DataConfig(name="fashion_mnist")) == (1, 32, 32)
    assert image_shape(DataConfig(name="fashion_mnist", size=28)) == (1, 28, 28)


@pytest.mark.parametrize(
    ("key", "value"), [("size", 16), ("size", 28), ("channels", 1), ("classes", 9)]
)
def test_settings_that_contradict_a_named_set_are_refused(key: str, value: int) -> None:
    config = DataConfig(**{"name": "cifar10", key: value})
    with pytest.raises(
        ConfigError, match=f"data.{key} = {value} contradicts data.name = 'cifar10'"
    ):
        (class_count if key == "classes" else image_shape)(config)


@pytest.mark.parametrize("name", ["image_folder", "my_module:load"])
def test_size_and_channels_are_required_where_they_are_not_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data.size is not set.*data.name = "):
        image_shape(DataConfig(name=name, channels=1))
    with pytest.raises(ConfigError, match=r"data.channels is not set.*data.name = "):
        image_shape(DataConfig(name=name, size=8))
    config = DataConfig(name=name, size=8, channels=3, classes=4)
    assert image_shape(config) == (3, 8, 8)
    assert class_count(config) == 4


@pytest.mark.parametrize("name", ["cifar", "", "module:", ":function"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    for ask in (load_dataset, image_shape, class_count):
        with pytest.raises(ConfigError, match=r"data.name = .* Allowed: digits, cifar10, svhn"):
            ask(DataConfig(name=name))


def test_the_digits_are_all_there_at_full_contrast() -> None:
    train, test = load_dataset(DataConfig()), load_dataset(DataConfig(), "test")
    assert train.images.shape == (1797, 1, 8, 8)
    assert len(train.images.unique()) == 17
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert train.labels is not None
    assert train.labels.unique().tolist() == list(range(10))
    assert torch.equal(train.images, test.images)


def test_the_digits_refuse_a_folder_that_would_not_be_read() -> None:
    with pytest.raises(ConfigError, match=r"data\.dir = '.*photos' would not be read.*photos"):
        load_dataset(load_config("digits", {"data.dir": "photos"}).data)


def test_the_digits_are_scikit_learns_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), load_dataset(DataConfig())
    assert np.array_equal(np.rint(ours.images[:, 0].numpy() * (16 / 255)), theirs.images)
    assert ours.labels is not None
    assert np.array_equal(ours.labels.numpy(), theirs.target)


# --- a function of one's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called with the source of a module: the DataConfig that names its `load`."""

    def write(body: str, **settings: Any) -> DataConfig:
        source = f"import numpy as np, torch\nfrom fed_diffusion.data import ImageSet\n{body}\n"
        (tmp_path / "own_images.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_images", raising=False)
        given = {"name": "own_images:load", "size": 4, "channels": 1, **settings}
        return DataConfig.model_validate(given)

    return write


@pytest.mark.parametrize(
    "result",
    [
        "np.full((2, 1, 4, 4), 7, np.uint8), [0, 3]",
        "np.full((4, 4, 1, 2), 7, np.uint8).T[::-1], np.array([0, 3], np.uint8)",
        "torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), torch.tensor([0, 3], dtype=torch.int32)",
        "ImageSet(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), torch.tensor([0, 3]))",
    ],
)
def test_a_function_of_ones_own_may_return_arrays_tensors_or_an_image_set(
    result: str, own: Any
) -> None:
    loaded = load_dataset(own(f"def load(config): return {result}", classes=4))
    assert loaded.images.tolist() == torch.full((2, 1, 4, 4), 7).tolist()
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [0, 3]


def test_a_function_of_ones_own_sees_the_settings_and_needs_no_labels(own: Any) -> None:
    body = "def load(config): return np.zeros((3, 1, config.size, 4), np.uint8), None"
    loaded = load_dataset(own(body))
    assert loaded.labels is None
    assert loaded.name == "own_images:load"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("def load(config): 1 / 0", "ZeroDivisionError"),
        ("def lod(config): pass", "has no attribute 'load'"),
        ("load = 3", "not callable"),
        ("import nowhere_to_be_found", "PYTHONPATH"),
        ("def load(config): return 3", "got int"),
        ("def load(config): return np.zeros((2, 1, 4, 4)), None", "must be uint8"),
        ("def load(config): return np.zeros((2, 4, 4), np.uint8), None", "must be uint8"),
        ("def load(config): return np.zeros((2, 1, 4, 4), np.uint8), [0]", "labels must be int64"),
        ("def load(config): return np.zeros((2, 1, 4, 4), np.uint8), [0, 0.5]", "integers"),
        ("def load(config): return np.zeros((2, 1, 4, 4), np.uint8), [0, 5]", "label 5"),
        ("def load(config): return np.zeros((2, 1, 4, 4), np.uint8), None", "no labels"),
        ("def load(config): return np.zeros((2, 3, 4, 4), np.uint8), [0, 1]", r"\[3, 4, 4\]"),
        ("def load(config): return np.zeros((2, 1, 4, 4), np.uint8), 'ab'", "labels|str"),
    ],
)
def test_a_function_that_fails_or_returns_something_else_is_refused_by_name(
    body: str, complaint: str, own: Any
) -> None:
    message = refused(own(body, classes=5))
    assert message.startswith("data.name = 'own_images:load'")
    assert re.search(complaint, message)


def test_a_module_that_is_not_there_is_refused_with_where_to_put_it() -> None:
    message = refused(DataConfig(name="nowhere_to_be_found:load", size=4, channels=1))
    assert "data.name = 'nowhere_to_be_found:load'" in message
    assert "PYTHONPATH" in message


def test_images_of_ones_own_in_folders_can_be_split_by_folder(own: Any) -> None:
    body = """
def load(config):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    return ImageSet(images, None, ("a", "b"), torch.tensor([0, 1, 0]), "mine")
"""
    data = own(body, partition="folders")
    parts = partition(load_dataset(data), data, 2, 0)
    assert [part.tolist() for part in parts] == [[0, 2], [1]]
