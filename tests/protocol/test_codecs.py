"""How far an update is from the theta that it began on."""

import numpy as np
import pytest
import torch

from fed_diffusion.masks.mask import Block, Scattered
from fed_diffusion.protocol.codecs import PART, difference

SIDE = 300  # more values than one part has


@pytest.mark.parametrize("kind", ["whole", "scattered", "block"])
def test_a_difference_is_the_sum_of_squares_of_what_the_mask_keeps(kind):
    draw = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(SIDE, SIDE, generator=draw), "b": torch.randn(3, generator=draw)}
    keep = torch.rand(SIDE, SIDE, generator=draw) < 0.8
    runs = (((0, 100), (150, SIDE)), ((20, 290),))
    kinds = {
        "whole": ({}, torch.ones(SIDE, SIDE, dtype=torch.bool)),
        "scattered": ({"w": Scattered(keep)}, keep),
        "block": ({"w": (block := Block((SIDE, SIDE), runs))}, block.dense()),
    }
    masks, kept = kinds[kind]
    began = {name: masks[name].take(v) if name in masks else v for name, v in theta.items()}
    values = {name: v + torch.randn(v.shape, generator=draw) for name, v in began.items()}
    square, count = difference(values, theta, masks)
    assert count == int(kept.sum()) + 3 > PART
    parts = [
        (values["w"].numpy().ravel(), theta["w"].numpy()[kept.numpy()]),
        (values["b"].numpy(), theta["b"].numpy()),
    ]
    exact = sum(np.sum((v - b).astype(np.float64) ** 2) for v, b in parts)
    assert square == pytest.approx(exact, rel=1e-12)


def test_the_difference_of_an_update_that_is_not_finite_is_not_finite_either():
    theta = {"w": torch.zeros(4)}
    for bad in (float("nan"), float("inf")):
        assert not np.isfinite(difference({"w": torch.tensor([1.0, bad, 0, 0])}, theta, {})[0])
