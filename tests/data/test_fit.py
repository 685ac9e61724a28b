"""Images of any size become squares: the middle is cut out, then scaled, then framed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data import image_shape, load_dataset
from fed_diffusion.data.fit import fit
from tests.data.test_image_folder import config, noise, refused, save


def settings(**given: Any) -> DataConfig:
    return DataConfig.model_validate({"name": "image_folder", "channels": 3, **given})


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_cropping_scaling_and_framing_are_those_of_pillow_in_this_order(mode: str) -> None:
    pixels = noise(21, 34, 3) if mode == "RGB" else noise(21, 34)
    image = Image.fromarray(pixels)
    square = image.crop((6, 0, 27, 21)).resize((12, 12), Image.Resampling.BICUBIC)
    framed = Image.new(mode, (16, 16), "white")
    framed.paste(square, (2, 2))
    planes = pixels.transpose(2, 0, 1) if mode == "RGB" else pixels[None]
    found = fit(planes, settings(crop="square", resize=12, pad=16, background="white"))
    assert np.array_equal(found, np.asarray(framed).reshape(16, 16, -1).transpose(2, 0, 1))


def test_many_images_are_changed_as_each_of_them_alone() -> None:
    images, how = noise(3, 2, 9, 14), settings(crop=8, resize=5, pad=7)
    assert np.array_equal(fit(images, how), np.stack([fit(image, how) for image in images]))


def test_an_image_that_is_not_square_keeps_its_shape_within_a_black_frame() -> None:
    found = fit(np.full((1, 10, 20), 200, np.uint8), settings(resize=8, pad=8))
    assert (found[0, 2:6] == 200).all()
    assert (found[0, :2] == 0).all()
    assert (found[0, 6:] == 0).all()


@pytest.mark.parametrize(
    ("given", "side"),
    [
        ({"crop": 6}, 6),
        ({"crop": 6, "resize": 4}, 4),
        ({"crop": "square", "resize": 4, "pad": 8, "size": 8}, 8),
        ({"crop": "square", "size": 9}, 9),
    ],
)
def test_the_last_change_says_the_size(given: dict[str, Any], side: int) -> None:
    assert image_shape(settings(**given)) == (3, side, side)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": 8, "pad": 16}, r"data\.size: 8 contradicts data\.pad = 16"),
        ({"size": 8, "resize": 16}, r"data\.size: 8 contradicts data\.resize = 16"),
        ({"resize": 16, "pad": 8}, r"data\.pad: 8 is less than the 16 pixels"),
        ({"crop": "round"}, r"data\.crop = 'round' is not allowed"),
        ({"pad": 0}, r"data\.pad = 0 is not allowed"),
    ],
)
def test_sizes_that_contradict_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("digits", {f"data.{key}": value for key, value in given.items()})


def test_photographs_of_all_sizes_are_brought_to_one(tmp_path: Path) -> None:
    for name, size in (("a.png", (40, 30)), ("b.jpg", (30, 30)), ("c.png", (17, 90))):
        save(tmp_path, name, noise(*size, 3))
    loaded = load_dataset(config(tmp_path, size=None, channels=3, crop="square", resize=16))
    assert loaded.images.shape == (3, 3, 16, 16)


def test_an_image_that_is_not_square_is_refused_with_the_options_that_mend_it(
    tmp_path: Path,
) -> None:
    save(tmp_path, "wide.png", noise(8, 10))
    for given in ({}, {"size": None, "resize": 8}):
        message = refused(config(tmp_path, **given))
        assert "wide.png is 10x8 pixels" in message
        for option in ("data.crop=square", "data.pad=N", "data.resize=N"):
            assert option in message
    assert load_dataset(config(tmp_path, size=None, pad=12)).images.shape == (1, 1, 12, 12)


def test_images_too_small_to_crop_or_too_large_to_frame_are_named(tmp_path: Path) -> None:
    save(tmp_path, "a.png", noise(8, 10))
    assert "a.png is 10x8 pixels, fewer than data.crop = 9" in refused(
        config(tmp_path, size=None, crop=9)
    )
    assert "a.png is 10x8 pixels, more than data.pad = 9" in refused(
        config(tmp_path, size=None, pad=9)
    )


def test_named_sets_and_own_functions_are_changed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_dataset(DataConfig(pad=16)).images
    assert digits.shape == (1797, 1, 16, 16)
    assert np.array_equal(digits[:, :, 4:12, 4:12], load_dataset(DataConfig()).images)
    (tmp_path / "wide.py").write_text(
        "import numpy\ndef load(config): return numpy.full((2, 3, 4, 6), 9, numpy.uint8), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_dataset(settings(name="wide:load", crop="square", size=4)).images.shape[2:] == (
        4,
        4,
    )
    with pytest.raises(ConfigError, match=r"each is 6x4 pixels, more than data\.pad = 5"):
        load_dataset(settings(name="wide:load", pad=5))
    with pytest.raises(ConfigError, match=r"data\.crop=square"):
        load_dataset(settings(name="wide:load", size=6))
