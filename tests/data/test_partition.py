"""Partitions: every image has one owner, every client has images, the same seed the same split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion import data as splitting
from fed_diffusion.config.schema import Config, ConfigError, DataConfig
from fed_diffusion.data import ImageSet, load_dataset
from fed_diffusion.data.partition import _apportion

KINDS = ("iid", "dirichlet", "shards")


def made(labels: Any = None, n: int = 0, **more: Any) -> ImageSet:
    """An ImageSet of blank 1x1 images with these labels, or `n` of them with none."""
    n = n if labels is None else len(labels)
    target = None if labels is None else torch.as_tensor(np.array(labels, dtype=np.int64))
    return ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), target, name="made", **more)


def config(clients: int, seed: int = 0, **data: Any) -> Config:
    return Config(clients=clients, seed=seed, data=DataConfig(**data))


def partition(dataset: ImageSet, run: Config) -> list[np.ndarray]:
    return splitting.partition(dataset, run.data, run.clients, run.seed)


def split_holdout(indices: np.ndarray, run: Config, client: int) -> splitting.Share:
    return splitting.split_holdout(indices, run.data.holdout, run.seed, client)


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ImageSet, Config]:
    labels = draw(st.lists(st.integers(0, 6), min_size=1, max_size=120))
    clients = draw(st.integers(1, len(labels)))
    present = len(set(labels))
    run = config(
        clients,
        seed=draw(st.integers(0, 2**63 - 1)),
        partition=draw(st.sampled_from(KINDS)),
        alpha=draw(st.floats(1e-6, 1e12)),
        classes_per_client=draw(st.integers(-(-present // clients), 8)),
        holdout=draw(st.floats(0, 1, exclude_max=True)),
    )
    return made(labels), run


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_image_has_exactly_one_owner_and_every_client_an_image(
    case: tuple[ImageSet, Config],
) -> None:
    dataset, run = case
    parts = partition(dataset, run)
    assert len(parts) == run.clients
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(dataset)))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_same_seed_gives_the_same_partition_and_holdout(case: tuple[ImageSet, Config]) -> None:
    dataset, run = case
    parts = partition(dataset, run)
    assert same(parts, partition(dataset, run))
    for client, part in enumerate(parts):
        assert same(
            list(split_holdout(part, run, client)),
            list(split_holdout(part[::-1].copy(), run, client)),
        )


@given(cases())
@settings(max_examples=200, deadline=None)
def test_a_client_of_shards_holds_at_most_its_number_of_classes(
    case: tuple[ImageSet, Config],
) -> None:
    dataset, run = case
    run = run.model_copy(update={"data": run.data.model_copy(update={"partition": "shards"})})
    assert dataset.labels is not None
    for part in partition(dataset, run):
        assert len(set(dataset.labels[part].tolist())) <= run.data.classes_per_client


@given(n=st.integers(1, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_iid_sizes_differ_by_at_most_one(n: int, data: st.DataObject) -> None:
    sizes = [len(part) for part in partition(made(n=n), config(data.draw(st.integers(1, n))))]
    assert max(sizes) - min(sizes) <= 1


@given(
    n=st.integers(1, 200), fraction=st.floats(0, 1, exclude_max=True), client=st.integers(0, 99_999)
)
@settings(max_examples=200, deadline=None)
def test_the_holdout_is_the_floor_of_its_share_and_never_everything(
    n: int, fraction: float, client: int
) -> None:
    indices = np.arange(n) * 3 + 1
    train, holdout = split_holdout(indices, config(1, holdout=fraction), client)
    assert len(holdout) == min(int(fraction * n), n - 1)
    assert len(train) >= 1
    assert (np.diff(train) > 0).all()
    assert (np.diff(holdout) > 0).all()
    assert sorted([*train, *holdout]) == indices.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_partition(kind: str) -> None:
    dataset = load_dataset(DataConfig())
    first = partition(dataset, config(10, seed=1, partition=kind))
    assert not same(first, partition(dataset, config(10, seed=2, partition=kind)))


def test_clients_hold_different_images_out() -> None:
    run = config(2, holdout=0.5)
    indices = np.arange(100)
    assert not same(list(split_holdout(indices, run, 0)), list(split_holdout(indices, run, 1)))


def test_the_partition_does_not_depend_on_what_is_held_out() -> None:
    dataset = load_dataset(DataConfig())
    first = partition(dataset, config(10, holdout=0.0))
    assert same(first, partition(dataset, config(10, holdout=0.5)))


def skew(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean total variation distance between a client's classes and everybody's."""
    everyone = np.bincount(labels, minlength=10) / len(labels)
    shares = [np.bincount(labels[part], minlength=10) / len(part) for part in parts]
    return float(np.mean([abs(share - everyone).sum() / 2 for share in shares]))


def test_a_smaller_alpha_is_a_more_unequal_split() -> None:
    dataset = load_dataset(DataConfig())
    assert dataset.labels is not None
    skews = [
        skew(
            dataset.labels.numpy(),
            partition(dataset, config(10, partition="dirichlet", alpha=alpha)),
        )
        for alpha in (1e-3, 0.1, 1.0, 100.0, 1e9)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.7
    assert skews[-1] < 0.02


def test_dirichlet_parts_have_the_mean_and_variance_of_the_distribution() -> None:
    clients, alpha, classes, size = 4, 0.5, 400, 1000
    dataset = made(np.repeat(np.arange(classes), size))
    assert dataset.labels is not None
    parts = partition(dataset, config(clients, partition="dirichlet", alpha=alpha))
    shares = np.array(
        [np.bincount(dataset.labels.numpy()[part], minlength=classes) / size for part in parts]
    )
    mean = 1 / clients
    assert np.allclose(shares.mean(axis=1), mean, atol=0.06)
    expected = mean * (1 - mean) / (clients * alpha + 1)
    assert np.allclose(shares.var(axis=1), expected, rtol=0.25)


def test_clients_that_dirichlet_leaves_empty_get_one_image_each() -> None:
    parts = partition(made([0] * 50), config(10, partition="dirichlet", alpha=1e-6))
    assert sorted(len(part) for part in parts) == [1] * 9 + [41]


def test_shards_of_equal_classes_are_equal() -> None:
    dataset = made(np.arange(1000) % 10)
    assert dataset.labels is not None
    parts = partition(dataset, config(10, partition="shards", classes_per_client=2))
    assert [len(part) for part in parts] == [100] * 10
    counts = [np.bincount(dataset.labels[part], minlength=10) for part in parts]
    assert all(set(count) <= {0, 50, 100} for count in counts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_the_largest_shard_is_as_small_as_it_can_be(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    pieces = _apportion(np.array(sizes), total)
    assert sum(pieces) == total
    assert all(1 <= count <= size for count, size in zip(pieces, sizes, strict=True))
    least = next(m for m in range(1, 61) if sum(-(-size // m) for size in sizes) <= total)
    assert max(-(-size // count) for count, size in zip(pieces, sizes, strict=True)) == least


def test_folders_give_each_client_its_own_folder() -> None:
    owner = torch.tensor([1, 0, 1, 2, 0, 1])
    dataset = made(n=6, folders=("ann", "bob", "eve"), folder_of=owner)
    parts = partition(dataset, config(3, partition="folders"))
    assert same(parts, [np.array([1, 4]), np.array([0, 2, 5]), np.array([3])])


def test_a_number_of_folders_other_than_clients_is_refused_with_both_numbers() -> None:
    dataset = made(n=2, folders=("ann", "bob"), folder_of=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"clients = 3.*2 client folders.*Set clients = 2"):
        partition(dataset, config(3, partition="folders"))


def test_an_empty_client_folder_is_named() -> None:
    dataset = made(n=1, folders=("ann", "bob"), folder_of=torch.tensor([0]))
    with pytest.raises(ConfigError, match="'bob' is empty"):
        partition(dataset, config(2, partition="folders"))


def test_folders_are_refused_for_a_set_without_them() -> None:
    with pytest.raises(ConfigError, match=r"data.partition = 'folders'.*'digits'"):
        partition(load_dataset(DataConfig()), config(10, partition="folders"))


@pytest.mark.parametrize("kind", KINDS)
def test_more_clients_than_images_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"clients = 6 .* 5 images of 'made'"):
        partition(made([0, 1, 2, 3, 4]), config(6, partition=kind))


@pytest.mark.parametrize("kind", ["dirichlet", "shards"])
def test_a_partition_by_label_is_refused_without_labels(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"data.partition = '{kind}' needs class labels"):
        partition(made(n=10), config(2, partition=kind))


def test_shards_too_few_for_all_classes_are_refused_with_the_least_number() -> None:
    with pytest.raises(ConfigError, match=r"data.classes_per_client = 2 .*Use at least 4"):
        partition(made(np.arange(100) % 10), config(3, partition="shards", classes_per_client=2))


def test_a_large_federation_is_split_in_seconds() -> None:
    dataset = made(np.arange(50_000) % 10)
    for kind in KINDS:
        parts = partition(dataset, config(20_000, partition=kind, alpha=0.01))
        assert len(parts) == 20_000
        assert min(map(len, parts)) >= 1
