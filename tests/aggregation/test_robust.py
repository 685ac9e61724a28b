"""Trimmed means and medians under masks."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.aggregation.robust import RobustMean, undefended
from fed_diffusion.masks.mask import Block, Scattered
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.server.coordinator import Coordinator

values = st.floats(-100, 100, width=32)
rows = st.lists(
    st.lists(st.tuples(values, st.booleans()), min_size=4, max_size=4), min_size=1, max_size=7
)


def fold(updates, trim, theta):
    mean = RobustMean({"w": theta}, trim)
    for row in updates:
        given = torch.tensor([value for value, _ in row])
        mean.add({"w": given}, {"w": Scattered(torch.tensor([kept for _, kept in row]))})
    return mean.result()["w"]


@given(updates=rows, trim=st.sampled_from((0.01, 0.1, 0.25, 0.4)))
def test_it_is_the_trimmed_mean_over_those_who_trained(updates, trim):
    theta = torch.tensor([7.0, 8.0, 9.0, 10.0])
    got = fold(updates, trim, theta)
    for i in range(4):
        here = sorted(row[i][0] for row in updates if row[i][1])
        cut = max(math.floor(trim * len(here)), 1) if len(here) >= 3 else 0
        cut = min(cut, max(len(here) - 1, 0) // 2)
        left = here[cut : len(here) - cut]
        expected = sum(left) / len(left) if left else float(theta[i])
        assert float(got[i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(updates=rows)
def test_half_of_the_values_trimmed_is_the_median(updates):
    got = fold(updates, 0.5, torch.zeros(4))
    for i in range(4):
        here = [row[i][0] for row in updates if row[i][1]]
        assert float(got[i]) == pytest.approx(statistics.median(here) if here else 0.0, abs=1e-5)


@given(updates=rows, data=st.data())
def test_the_order_of_arrival_changes_no_bit(updates, data):
    order = data.draw(st.permutations(updates))
    assert torch.equal(fold(updates, 0.2, torch.zeros(4)), fold(order, 0.2, torch.zeros(4)))


@given(
    honest=st.lists(values, min_size=2, max_size=12),
    lie=st.sampled_from((-8e3, 8e3)),
    trim=st.sampled_from((0.1, 0.5)),
)
def test_from_three_trainers_on_one_liar_moves_nothing_beyond_the_honest_values(honest, lie, trim):
    mean = RobustMean({"w": torch.zeros(1)}, trim)
    for value in [*honest, lie]:
        mean.add({"w": torch.tensor([value])})
    assert min(honest) <= float(mean.result()["w"]) <= max(honest)


@pytest.mark.parametrize("trim", [0.1, 0.5])
def test_one_of_two_trainers_decides_and_such_coordinates_are_counted(trim):
    mean = RobustMean({"w": torch.zeros(4)}, trim)
    for kept in ([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]):
        mask = Scattered(torch.tensor(kept) > 0)
        mean.add({"w": torch.full((4,), 8e3)}, {"w": mask})
    mean.add({"w": torch.zeros(4)}, {"w": Scattered(torch.tensor([1, 1, 1, 0]) > 0)})
    assert undefended(mean.coverage.trainers()) == 1
    assert float(mean.result()["w"][2]) == 4e3
    assert undefended({0: 7, 1: 5, 2: 3, 3: 100, 9: 1000}) == 8


def test_blocks_count_as_the_masks_they_are():
    theta = torch.zeros(3, 4)
    block = Block((3, 4), (((0, 1), (2, 3)), ((1, 3),)))
    small = torch.arange(4.0).view(2, 2)
    mean = RobustMean({"w": theta}, 0.5)
    mean.add({"w": small}, {"w": block})
    mean.add({"w": torch.ones(3, 4)})
    expected = torch.where(block.dense(), (block.put(small, torch.zeros(3, 4)) + 1) / 2, 1.0)
    assert torch.equal(mean.result()["w"], expected)
    assert (mean.coverage.gamma(), mean.coverage.trained()) == (1, 1.0)


def test_bad_updates_and_weights_are_refused():
    mean = RobustMean({"w": torch.zeros(2)}, 0.5)
    with pytest.raises(UpdateError, match="not finite"):
        mean.add({"w": torch.tensor([math.nan, 0.0])})
    with pytest.raises(UpdateError, match="take no weights"):
        mean.add({"w": torch.zeros(2)}, weight=2)
    assert torch.equal(mean.result()["w"], torch.zeros(2))


def test_there_is_room_for_as_many_updates_as_the_round_has_clients(tiny):
    config = tiny(clients=1100, round__aggregation="median", model__widths=[8])
    coordinator = Coordinator(config, {"w": torch.zeros(2)})
    next(coordinator.tasks(1))
    mean = coordinator.open.mean
    for value in range(1100):
        mean.add({"w": torch.full((2,), float(value))})
    assert mean.result()["w"].tolist() == [549.5, 549.5]
