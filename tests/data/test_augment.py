"""Training images are changed by torchvision's transforms, from a stream of the round's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.config import ConfigError, build_config, load_config
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.data import augmentation, load_dataset
from fed_diffusion.experiment import Experiment
from tests.tiny import TINY

CROP = [{"RandomCrop": {"size": 8, "padding": 1}}]
ALL = [*CROP, "RandomVerticalFlip", {"ColorJitter": {"brightness": 0.5}}]


def config(**given: Any) -> Any:
    return load_config("digits", TINY | {"data.augment": ALL, "evaluation.every": 0} | given)


def images(n: int = 6) -> Tensor:
    return load_dataset(DataConfig()).images[:n]


def changed(seed: int, batch: Tensor, augment: Any = ALL) -> Tensor:
    made = augmentation(DataConfig(augment=augment))
    assert made is not None
    return made(batch, generator(seed, Purpose.AUGMENTATION, 1, 2))


def test_the_same_stream_changes_images_alike_and_another_one_otherwise() -> None:
    assert torch.equal(changed(0, images()), changed(0, images()))
    assert not torch.equal(changed(0, images()), changed(1, images()))
    assert not torch.equal(changed(0, images()), images())


def test_each_image_is_changed_by_itself() -> None:
    same = images(1).expand(32, -1, -1, -1)
    assert len(changed(0, same, CROP).flatten(1).unique(dim=0)) > 4
    shifts = {tuple(one) for one in changed(0, same, CROP).flatten(1).tolist()}
    padded = torch.nn.functional.pad(images(1)[0], (1, 1, 1, 1))
    possible = {
        tuple(padded[:, top : top + 8, left : left + 8].flatten().tolist())
        for top in range(3)
        for left in range(3)
    }
    assert shifts <= possible


def test_torchs_own_generator_neither_decides_nor_moves() -> None:
    torch.manual_seed(1)
    first, state = changed(0, images()), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(changed(0, images()), first)


def test_a_configuration_keeps_its_transforms_when_it_is_written_and_read() -> None:
    given = config(**{"data.augment": ["RandomVerticalFlip", {"RandomCrop": {"size": "8"}}]})
    assert given.data.augment == ({"RandomVerticalFlip": {}}, {"RandomCrop": {"size": 8}})
    assert build_config(given.to_dict()) == given
    alone = config(**{"data.augment": {"RandomErasing": {"p": "0.5", "inplace": "false"}}})
    assert alone.data.augment == ({"RandomErasing": {"p": 0.5, "inplace": False}},)


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        (
            ["RandomHorizontalFlop"],
            r"data\.augment\[0\] = 'RandomHorizontalFlop' is not a transform",
        ),
        (["RandomHorizontalFlop"], "Did you mean 'RandomHorizontalFlip'"),
        (["Compose"], "is not a transform"),
        (["RandomVerticalFlip", "RandomCrop"], r"data\.augment\[1\] = 'RandomCrop' failed"),
        ([{"RandomCrop": {"size": 7}}], r"makes uint8 \[1, 7, 7\]"),
        ([{"RandomShortestSize": {"min_size": [7, 8]}}], r"makes uint8 \[1, 7, 7\]"),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], "failed with TypeError"),
        ([{"RandomCrop": 8}], "give the options of RandomCrop as"),
        ([{"RandomCrop": {}, "JPEG": {}}], "give each transform as Name"),
    ],
)
def test_what_does_not_give_images_of_the_same_shape_is_refused_before_a_run(
    augment: Any, says: str, tmp_path: Any
) -> None:
    with pytest.raises(ConfigError, match=says):
        Experiment(config(**{"data.augment": augment}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_gives_the_same_bits_whatever_the_worker_did_before(tmp_path: Any) -> None:
    given = config()
    tasks = list(Experiment(given, tmp_path / "run").tasks(1))[:2]
    one, other = Worker(given), Worker(given)
    expected = one.run(tasks[1]).payload.arrays
    other.run(tasks[0])
    torch.manual_seed(3)
    assert other.run(tasks[1]).payload.arrays == expected
    plain = Worker(config(**{"data.augment": []})).run(tasks[1]).payload.arrays
    assert plain != expected


def test_held_out_images_are_not_changed(tmp_path: Any) -> None:
    task = next(iter(Experiment(config(), tmp_path / "run").tasks(1)))
    numbers = [
        Worker(config(**{"data.augment": augment})).run(task).payload.numbers
        for augment in ([], ALL)
    ]
    assert numbers[0]["holdout_loss"] == numbers[1]["holdout_loss"]
    assert numbers[0]["loss"] != numbers[1]["loss"]
