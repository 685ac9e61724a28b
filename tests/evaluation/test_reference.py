"""Which real images evaluation.reference means, and the features of them that stay on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.config import Config, build_config, load_config
from fed_diffusion.config.schema import ConfigError
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation.cache import cache_dir, cached
from fed_diffusion.evaluation.reference import reference_set
from tests.data.test_torchvision_sets import write_cifar10


def settings(reference: str, **data: Any) -> Config:
    evaluation = {"reference": reference, "extractor": "classifier"}
    return build_config({"clients": 4, "data": data, "evaluation": evaluation})


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_train_is_what_the_clients_trained_on_and_test_what_they_held_out(
    digits: ImageSet,
) -> None:
    config = settings("train", holdout=0.2)
    train, test = (
        reference_set(Setup.of(settings(word, holdout=0.2)), digits) for word in ("train", "test")
    )
    assert train is not None
    assert test is not None
    splits = Setup.of(config).shares(digits)
    for found, which in ((train, 0), (test, 1)):
        assert len(found.images) == sum(len(split[which]) for split in splits)
        assert torch.equal(found.teacher.images, train.images.images)
    assert rows(train.images.images) | rows(test.images.images) == rows(digits.images)
    assert (train.images.name, test.images.name) == ("digits train", "digits held out")


def test_data_is_the_whole_set_and_its_own_teacher(digits: ImageSet) -> None:
    found = reference_set(Setup.of(settings("data")), digits)
    assert found is not None
    assert found.images is digits
    assert found.teacher is digits


def test_the_test_split_of_a_set_that_has_one_is_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    config = settings("test", name="cifar10", dir=str(tmp_path), holdout=0.5)
    found = reference_set(Setup.of(config), None)
    assert found is not None
    assert rows(found.images.images) == rows(
        torch.from_numpy(pixels["test_batch"].reshape(2, 3, 32, 32))
    )
    assert found.images.name == "cifar10 test"
    assert found.holdings is not None
    assert len(found.teacher) == sum(map(len, found.holdings.train)) < 10


def test_a_set_without_a_test_split_and_without_held_out_images_is_refused(
    digits: ImageSet,
) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reference = 'test'.*data\.holdout"):
        reference_set(Setup.of(settings("test", holdout=0)), digits)


def test_a_folder_says_nothing_of_the_clients_images(tmp_path: Path, digits: ImageSet) -> None:
    from PIL import Image

    for i in range(4):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(tmp_path / str(i % 2) / f"{i}.png")
    found = reference_set(Setup.of(settings(str(tmp_path))), digits)
    assert found is not None
    assert found.holdings is None
    assert len(found.images) == 4


@pytest.mark.parametrize("word", ["data", "train", "test", "none"])
def test_words_are_no_paths(word: str) -> None:
    assert load_config("digits", {"evaluation.reference": word}).evaluation.reference == word


# --- the cache


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.arange(6.0).reshape(3, 2)


def test_features_are_computed_once_per_key(cache: Path) -> None:
    compute = Counted()
    first, again = cached("a", 3, compute), cached("a", 3, compute)
    assert torch.equal(first, again)
    assert compute.calls == 1
    cached("b", 3, compute)
    assert compute.calls == 2
    assert sorted(os.listdir(cache)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "another shape", "not finite"])
def test_damaged_features_are_computed_again_with_a_warning(
    damage: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Counted()
    whole, path = cached("a", 3, compute), cache / "a.safetensors"
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "other bytes":
        path.write_bytes(b"\xff" * 100)
    elif damage == "another shape":
        save_file({"features": torch.zeros(5, 2)}, path)
    else:
        save_file({"features": torch.full((3, 2), float("nan"))}, path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached("a", 3, compute), whole)
    assert "damaged" in caplog.text
    assert compute.calls == 2
    assert torch.equal(load_file(path)["features"], whole)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached("a", 3, Counted()), Counted()())
    assert "cannot be cached" in caplog.text


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FED_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fed-diffusion" / "features"
    monkeypatch.setenv("FED_DIFFUSION_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own" / "features"
    monkeypatch.delenv("FED_DIFFUSION_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fed-diffusion" / "features"


def test_a_reference_of_other_sides_is_refused_by_its_own_name(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError) as caught:
        reference_set(Setup.of(settings(str(tmp_path))), None)
    said = str(caught.value)
    assert said.startswith(f"evaluation.reference = {str(tmp_path)!r} does not fit")
    assert "8x8 pixels" in said
    assert "convert" in said
