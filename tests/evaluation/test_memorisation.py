"""Copies are found and traced to their client; fresh images are harmless."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.config import build_config
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.data.partition import partition, split_holdout
from fed_diffusion.evaluation import memorisation as module
from fed_diffusion.evaluation.memorisation import Holdings, holdings, memorisation, nearest

CLIENTS = 5


@pytest.fixture(scope="module")
def shuffled(digits: ImageSet) -> ImageSet:
    """The digits in random order: as they come, their writers change along the way."""
    return digits.subset(np.random.default_rng(0).permutation(len(digits)))


@pytest.fixture(scope="module")
def known(shuffled: ImageSet) -> Holdings:
    """The first 1200 are the run's; 240 of them held out."""
    config = build_config({"clients": CLIENTS, "data": {"holdout": 0.2}})
    images = shuffled.subset(range(1200))
    return holdings(images, Setup.of(config).shares(images), config.data.flip)


@pytest.fixture(scope="module")
def fresh(shuffled: ImageSet) -> Tensor:
    return shuffled.images[1200:]


def with_copies(fresh: Tensor, known: Holdings, client: int, copies: int, noise: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    source = known.images[torch.from_numpy(known.train[client][:copies])].float()
    noisy = source + noise * torch.randn(source.shape, generator=generator)
    return torch.cat([noisy.round().clamp(0, 255).to(torch.uint8), fresh[copies:]])


def test_holdings_are_what_the_workers_train_on(shuffled: ImageSet) -> None:
    config = build_config({"clients": 3, "seed": 4, "data": {"holdout": 0.1, "flip": True}})
    found = holdings(shuffled, Setup.of(config).shares(shuffled), config.data.flip)
    for client, part in enumerate(partition(shuffled, config.data, 3, 4)):
        train, held = split_holdout(part, 0.1, 4, client)
        assert np.array_equal(found.train[client], train)
        assert set(held) <= set(found.held)
    everything = np.concatenate([*found.train, found.held])
    assert sorted(everything) == list(range(len(shuffled)))
    assert found.flip


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_a_generator_that_copies_a_clients_images_is_found_and_the_client_named(
    fresh: Tensor, known: Holdings, noise: float
) -> None:
    found = memorisation(with_copies(fresh, known, 3, 60, noise), known)
    assert found["copied"] == [3]
    assert found["closer"] >= 60 / len(fresh)
    assert found["p_value"] < 1e-3
    by_client = {entry["client"]: entry for entry in found["clients"]}
    assert by_client[3]["closer"] >= 60 / len(fresh)
    assert by_client[3]["share"] > 1.3 * by_client[3]["held_out_share"]
    assert by_client[3]["images"] == len(known.train[3])


def test_fresh_images_are_harmless(fresh: Tensor, known: Holdings) -> None:
    found = memorisation(fresh, known)
    assert found["why"] is None
    assert found["copied"] == []
    assert found["p_value"] > 0.01
    assert found["closer"] < 5 * found["expected"]
    assert found["median_ratio"] == pytest.approx(1, abs=0.1)
    assert sum(entry["share"] for entry in found["clients"]) == pytest.approx(1)
    assert json.loads(json.dumps(found)) == found


def test_a_client_is_blamed_without_cause_as_rarely_as_it_says() -> None:
    rng, blamed = np.random.default_rng(0), 0
    for _ in range(100):
        pixels = torch.from_numpy(rng.integers(0, 256, (260, 1, 2, 2), dtype=np.uint8))
        parts = [np.arange(30 * c, 30 * c + 30) for c in range(4)]
        case = Holdings(pixels[:160], parts, np.arange(120, 160))
        blamed += bool(memorisation(pixels[160:], case)["copied"])
    assert blamed <= 2


def test_the_p_value_of_fresh_images_is_as_small_as_it_says_as_often_as_it_says() -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(400):
        pixels = torch.from_numpy(rng.integers(0, 256, (220, 3, 4, 4), dtype=np.uint8))
        case = Holdings(pixels[:160], [np.arange(60)], np.arange(60, 160))
        found.append(memorisation(pixels[160:], case)["p_value"])
    for copies in (1, 2, 3):
        level = scipy.stats.betabinom(60, 1, 100).sf(copies - 1)
        expected = scipy.stats.binom(400, level).interval(0.999)
        assert expected[0] <= np.sum(np.array(found) <= level * (1 + 1e-9)) <= expected[1]


def test_a_mirrored_copy_is_a_copy_where_training_mirrored(fresh: Tensor, known: Holdings) -> None:
    images = with_copies(fresh, known, 2, 60, 0.0).flip(-1)
    mirroring = Holdings(known.images, known.train, known.held, flip=True)
    assert memorisation(images, mirroring)["copied"] == [2]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10**6))
def test_the_nearest_image_is_the_nearest(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 256, (k, 3, 2, 2), dtype=np.uint8) for k in (n, m))
    apart = a[:, None].astype(np.float64) - b[None]
    expected = np.sqrt((apart**2).mean(axis=(2, 3, 4)))
    distance, index = nearest(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(distance, expected.min(axis=1))
    np.testing.assert_allclose(expected[np.arange(n), index], expected.min(axis=1))


def test_the_nearest_image_does_not_depend_on_the_chunks(
    fresh: Tensor, known: Holdings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nearest(fresh, known.images)
    monkeypatch.setattr(module, "CHUNK", 50)
    parts = nearest(fresh, known.images)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 300))
def test_the_chance_is_the_beta_binomials(n: int, a: int, b: int) -> None:
    expected = scipy.stats.betabinom(n, a, b).sf(np.arange(-1, n))
    np.testing.assert_allclose(module._at_least(n, a, b), expected, atol=1e-9)


def without(**changes: Any) -> dict[str, Any]:
    images = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2)
    parts = {"images": images, "train": [np.arange(8)], "held": np.arange(8, 10)}
    return memorisation(images[:5], Holdings(**{**parts, **changes}))


def test_what_cannot_be_told_has_a_reason() -> None:
    assert "does not hold" in memorisation(torch.zeros(1, 1, 2, 2).byte(), None)["why"]
    assert "data.holdout" in without(held=np.arange(0))["why"]
    assert "shape" in without(images=torch.zeros(10, 3, 2, 2, dtype=torch.uint8))["why"]
    assert "training images too" in without(held=np.array([1, 2]))["why"]
