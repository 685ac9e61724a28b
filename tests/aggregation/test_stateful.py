"""The mean (8) of theta and of the optimiser's state: exact, however small its values are."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.stateful import StatefulMean
from fed_diffusion.masks.mask import Block, Scattered
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.moments import FIRST, SECOND, STEPS

THETA = {"w": torch.zeros(4, 3), "b": torch.zeros(2)}
STATE = {p + n: torch.zeros(v.shape) for p in (FIRST, SECOND, STEPS) for n, v in THETA.items()}
FLOATS = st.floats(-60, 60, width=32) | st.floats(-(2.0**-100), 2.0**-100, width=32)


def mean(workers, heaviest=1):
    return StatefulMean(THETA, STATE, workers, heaviest)


def update_of(values):
    """An update in which every tensor begins with these values."""
    whole = THETA | STATE
    found = {n: torch.tensor(np.resize(np.float32(values), v.shape)) for n, v in whole.items()}
    return found | {n: v.abs().mul(1000).ceil() for n, v in found.items() if n.startswith(STEPS)}


@given(st.lists(FLOATS, min_size=12, max_size=12))
def test_the_mean_of_one_update_is_that_update_to_the_bit(values):
    update = update_of(values)
    average = mean(1)
    average.add(update)
    result = average.result()
    assert result.keys() == update.keys()
    for name, value in update.items():
        assert torch.equal(result[name], value), name


@settings(max_examples=30)
@given(st.lists(st.lists(FLOATS, min_size=12, max_size=12), min_size=2, max_size=4))
def test_the_order_of_arrival_does_not_matter_and_the_mean_is_that_of_float64(found):
    updates = [update_of(values) for values in found]
    results = []
    for order in itertools.islice(itertools.permutations(updates), 6):
        average = mean(len(updates))
        for update in order:
            average.add(update)
        results.append(average.result())
    for name in updates[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results)
        exact = torch.stack([u[name] for u in updates]).double().mean(0)
        magnitude = torch.stack([u[name] for u in updates]).double().abs().max()
        error = (results[0][name].double() - exact).abs().max()
        assert float(error) <= 1e-7 * float(magnitude)


def test_masks_are_thetas_and_hold_for_the_state_too():
    keep = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    block = Block((4, 3), (((0, 2),), ((1, 3),)))
    first, second = update_of([1e-14, 2e-14, 3e-14]), update_of([5e-14])
    average = mean(2)
    average.add(
        {n: v[keep] if n.endswith("w") else v for n, v in first.items()}, {"w": Scattered(keep)}
    )
    average.add({n: v[:2, 1:] if n.endswith("w") else v for n, v in second.items()}, {"w": block})
    result = average.result()
    for name in ("w", FIRST + "w", SECOND + "w", STEPS + "w"):
        for i, j in itertools.product(range(4), range(3)):
            found = [first[name][i, j]] if keep[i, j] else []
            found += [second[name][i, j]] if i < 2 and j >= 1 else []
            expected = sum(map(float, found)) / len(found) if found else 0.0
            assert float(result[name][i, j]) == pytest.approx(expected, rel=1e-7, abs=1e-30)
    assert average.coverage.gamma() == 0
    assert average.coverage.trainers() == {0: 3, 1: 8, 2: 3}


def test_a_weighted_mean_of_tiny_values_keeps_its_precision():
    average = mean(3, heaviest=2**24)
    found = [(1.5e-13, 3), (7.25e-13, 2**24), (1e-20, 17)]
    for value, weight in found:
        average.add(update_of([value]), weight=weight)
    total = sum(weight for _, weight in found)
    expected = sum(float(np.float32(value)) * weight for value, weight in found) / total
    for name, value in average.result().items():
        wanted = 1.0 if name.startswith(STEPS) else expected
        assert float(value.view(-1)[0]) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_of_an_update_whose_state_is_bad_nothing_is_added(bad):
    good, odd = update_of([1e-9, 0.5]), update_of([0.25])
    odd[SECOND + "b"][1] = bad
    average = mean(2)
    average.add(good)
    with pytest.raises(UpdateError, match="moment2:b"):
        average.add(odd)
    assert average.coverage.updates == 1
    for name, value in average.result().items():
        assert torch.equal(value, good[name])
