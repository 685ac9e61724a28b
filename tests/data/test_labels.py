"""Images without classes, or of which some have one: every message says what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fed_diffusion.checks import check
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.data import ImageSet
from tests.data.test_image_folder import noise, save
from tests.tiny import TINY


def refused(folder: Path, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config(folder, **given))
    return str(caught.value)


def config(folder: Path, **given: Any) -> Any:
    data = {"data.name": "image_folder", "data.dir": str(folder), "data.channels": 1}
    settings = TINY | data | {"data.resize": 8, "model.conditional": True, "clients": 2}
    return load_config("digits", settings | {k.replace("__", "."): v for k, v in given.items()})


def test_whichever_key_is_set_the_message_names_the_one_that_helps(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path, f"{i}.png", noise(8, 8, seed=i))
    for given in ({}, {"data__classes": 10}, {"data__class_names": ["a", "b"]}):
        assert "model.conditional=false" in refused(tmp_path, **given)
    assert check(config(tmp_path, model__conditional=False)) is not None


def test_what_the_messages_say_is_taken_one_after_the_other_and_ends(tmp_path: Path) -> None:
    """As a user does who changes just what is asked for, with figures by a classifier."""
    save(tmp_path, "a.png", noise(8, 8))
    save(tmp_path, "b.png", noise(8, 8))
    given: dict[str, Any] = {"evaluation__samples": 100, "data__classes": 10}
    for key, value in (
        ("model__conditional", False),
        ("data__classes", None),
        ("evaluation__samples", 0),
    ):
        assert f"{key.replace('__', '.')}={'null' if value is None else str(value).lower()}" in (
            refused(tmp_path, **given)
        )
        given[key] = value
    assert check(config(tmp_path, **given)) is not None


def test_images_of_which_some_have_a_class_are_refused_with_what_to_set(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/a.png", "loose.png"):
        save(tmp_path / "flat", name)
    assert "model.conditional=false" in refused(tmp_path / "flat", data__classes=2)
    for name in ("ann/cat/a.png", "bob/a.png"):
        save(tmp_path / "clients", name)
    given = {"data__classes": 1, "data__partition": "folders"}
    assert "model.conditional=false" in refused(tmp_path / "clients", **given)
    with pytest.raises(ValueError, match=r"found -1: .*model\.conditional=false"):
        ImageSet(torch.zeros((2, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, -1]))


def test_a_function_without_labels_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare.py").write_text(
        "import numpy\ndef load(config): return numpy.zeros((4, 1, 8, 8), numpy.uint8), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(tmp_path, data__name="bare:load", data__classes=2)
    assert "set model.conditional=false and data.classes=null" in message
