"""Equation (8) against a brute-force oracle."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation import exact
from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.masks.mask import Block, Scattered, kept_values
from fed_diffusion.protocol.errors import UpdateError

SHAPES = {"a": (3, 2), "b": (4,)}


def random_updates(seed, n, masked=True):
    rng = np.random.default_rng(seed)
    updates = []
    for _ in range(n):
        scale = 10 ** rng.uniform(-6, 2)
        values = {
            k: torch.tensor(rng.normal(size=s) * scale, dtype=torch.float32)
            for k, s in SHAPES.items()
        }
        masks = {k: Scattered(torch.tensor(rng.random(s) < 0.5)) for k, s in SHAPES.items()}
        if not masked or rng.random() < 0.3:
            masks = {}
        updates.append((values, masks, int(rng.integers(1, 4))))
    return updates


def theta_of(seed):
    rng = np.random.default_rng(seed)
    return {k: torch.tensor(rng.normal(size=s), dtype=torch.float32) for k, s in SHAPES.items()}


def brute_force(theta, updates, name, index):
    """(8) for one coordinate, in exact fractions."""
    total, weights = Fraction(0), 0
    for values, masks, weight in updates:
        if name not in masks or bool(masks[name].dense()[index]):
            total += weight * Fraction(float(values[name][index]))
            weights += weight
    return total / weights if weights else Fraction(float(theta[name][index]))


def result_of(theta, updates):
    mean = MaskedMean(theta)
    for values, masks, weight in updates:
        mean.add(values, masks, weight)
    return mean


@given(seed=st.integers(0, 10**6), n=st.integers(0, 6))
@settings(max_examples=60)
def test_every_coordinate_is_the_mean_over_those_who_trained_it(seed, n):
    theta, updates = theta_of(seed + 1), random_updates(seed, n)
    result = result_of(theta, updates).result()
    for name, shape in SHAPES.items():
        for index in np.ndindex(shape):
            exact = float(brute_force(theta, updates, name, index))
            got = float(result[name][index])
            ulp = float(np.spacing(np.float32(abs(exact))))
            assert abs(got - exact) <= 2.0**-40 + ulp


@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
@settings(max_examples=60)
def test_the_result_has_the_same_bits_in_any_order_of_arrival(seed, order):
    theta, updates = theta_of(seed), random_updates(seed, 5)
    first = result_of(theta, updates).result()
    second = result_of(theta, [updates[i] for i in order]).result()
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_coordinates_nobody_trained_keep_theta():
    theta = theta_of(3)
    mask = {"a": Scattered(torch.zeros(3, 2, dtype=torch.bool))}
    values = {k: torch.ones(s) for k, s in SHAPES.items()}
    mean = MaskedMean(theta)
    mean.add(values, mask)
    assert torch.equal(mean.result()["a"], theta["a"])
    assert torch.equal(mean.result()["b"], values["b"])
    assert mean.coverage.gamma() == 0
    assert mean.coverage.trained() == pytest.approx(0.4)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_all_ones_masks_are_the_plain_mean(seed):
    updates = [(v, {}, 1) for v, _, _ in random_updates(seed, 4, masked=False)]
    result = result_of(theta_of(seed), updates).result()
    for name in SHAPES:
        plain = np.mean([u[0][name].double().numpy() for u in updates], axis=0)
        ulp = np.spacing(np.abs(plain).astype(np.float32))
        assert (np.abs(result[name].double().numpy() - plain) <= 2.0**-40 + ulp).all()


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
@settings(max_examples=30)
def test_coverage_counts_the_trainers_of_each_coordinate(seed, n):
    updates = random_updates(seed, n)
    mean = result_of(theta_of(seed), updates)
    coverage = mean.coverage.counts()
    for name, shape in SHAPES.items():
        for index in np.ndindex(shape):
            count = sum(name not in m or bool(m[name].dense()[index]) for _, m, _ in updates)
            assert int(coverage[name][index]) == count
    assert mean.coverage.gamma() == min(int(c.min()) for c in coverage.values())


BAD = {
    "not finite": lambda v: v["a"].fill_(float("nan")),
    "finite": lambda v: v["a"].view(-1)[2:3].fill_(float("-inf")),
    "beyond": lambda v: v["b"].fill_(1e9),
    "names differ": lambda v: v.pop("b"),
    "is torch.float32": lambda v: v.update(a=torch.ones(2, 3)),
    "is torch.int64": lambda v: v.update(a=torch.ones(3, 2, dtype=torch.int64)),
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_update_is_refused_whole(complaint):
    theta, good = theta_of(0), {k: torch.ones(s) for k, s in SHAPES.items()}
    mean = MaskedMean(theta)
    mean.add(good)
    before = mean.result()
    bad = {k: v.clone() for k, v in good.items()}
    BAD[complaint](bad)
    with pytest.raises(UpdateError, match=complaint):
        mean.add(bad)
    assert all(torch.equal(before[name], mean.result()[name]) for name in SHAPES)
    assert mean.coverage.gamma() == 1


def test_what_a_mask_drops_is_not_read():
    mean = MaskedMean({"w": torch.tensor([1.0, 2.0])})
    kept = Scattered(torch.tensor([True, False]))
    mean.add({"w": torch.tensor([5.0, float("nan")])}, {"w": kept})
    assert mean.result()["w"].tolist() == [5.0, 2.0]


@pytest.mark.parametrize("weight", [0, -1, 0.5])
def test_weights_are_positive_whole_numbers(weight):
    with pytest.raises(UpdateError, match="weight"):
        MaskedMean({"w": torch.zeros(1)}).add({"w": torch.zeros(1)}, weight=weight)


@given(st.lists(st.floats(-(2.0**13), 2.0**13, width=32), min_size=1, max_size=20))
def test_values_count_as_multiples_of_2_to_the_minus_40_rounded_half_to_even(values):
    mean = MaskedMean({"w": torch.zeros(len(values))}, workers=1)
    mean.add({"w": torch.tensor(values)})
    exact = [round(Fraction(value) * 2**40) for value in values]
    assert mean._sums["w"].tolist() == exact


def test_sums_that_could_overflow_are_refused():
    """Whatever came before: so one client's large values cost no other client its update."""
    mean = MaskedMean({"w": torch.zeros(1)}, workers=2)
    with pytest.raises(UpdateError, match="beyond"):
        mean.add({"w": torch.tensor([2.0**22])})
    for _ in range(2):
        mean.add({"w": torch.tensor([2.0**22 - 1])})
    assert mean.result()["w"].item() == 2.0**22 - 1
    with pytest.raises(UpdateError, match="no room"):
        mean.add({"w": torch.zeros(1)})


def a_block(rng, shape):
    """A random sub-block, as runs of single indices."""
    kept = [sorted(rng.choice(n, int(rng.integers(1, n + 1)), replace=False)) for n in shape]
    return Block(shape, tuple(tuple((int(i), int(i) + 1) for i in axis) for axis in kept))


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), order=st.randoms())
@settings(max_examples=60)
def test_blocks_and_kept_values_are_the_masked_tensors_they_stand_for_in_any_order(seed, n, order):
    rng = np.random.default_rng(seed)
    theta = theta_of(seed)
    blocks = [{k: a_block(rng, s) for k, s in SHAPES.items()} for _ in range(2)]
    updates = []
    for values, masks, weight in random_updates(seed, n):
        # often the same block again, as for workers of one size
        chosen = blocks[int(rng.integers(2))] if rng.random() < 0.7 else None
        updates.append((values, masks, chosen, weight))
    dense, mixed = MaskedMean(theta), MaskedMean(theta)
    for values, masks, chosen, weight in updates:
        as_masks = {k: Scattered(b.dense()) for k, b in chosen.items()} if chosen else masks
        dense.add(values, as_masks, weight)
    order.shuffle(updates)
    for values, masks, chosen, weight in updates:
        kept = chosen or masks  # only what a block or a mask keeps
        small = kept_values(values, kept)
        mixed.add(small, kept, weight)
    one, two = dense.result(), mixed.result()
    assert all(torch.equal(one[name], two[name]) for name in theta)
    one, two = dense.coverage.counts(), mixed.coverage.counts()
    assert all(torch.equal(one[name], two[name]) for name in theta)
    one, two = dense.coverage, mixed.coverage
    assert (one.gamma(), one.trained()) == (two.gamma(), two.trained())


@given(seed=st.integers(0, 10_000), bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e9]))
@settings(max_examples=100)
def test_a_bad_value_in_any_part_of_an_update_leaves_no_trace_of_it(seed, bad):
    """Parts before it are added when it is met, and have to come out again to the bit."""
    rng, theta = np.random.default_rng(seed), theta_of(seed)
    alone, disturbed = MaskedMean(theta), MaskedMean(theta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK", int(rng.integers(1, 4)))
        for values, masks, weight in random_updates(seed, 3):
            chosen = {k: a_block(rng, s) for k, s in SHAPES.items()} if rng.random() < 0.5 else {}
            kept = chosen or masks
            small = kept_values(values, kept)
            alone.add(small, kept, weight)
            wrong = {k: v.clone() for k, v in small.items()}
            flat = wrong[str(rng.choice([k for k, v in wrong.items() if v.numel()] or ["a"]))]
            if flat.numel():
                flat.view(-1)[int(rng.integers(flat.numel()))] = bad
                with pytest.raises(UpdateError, match=r"not finite|beyond"):
                    disturbed.add(wrong, kept, weight)
            disturbed.add(small, kept, weight)
    one, two = alone.result(), disturbed.result()
    assert all(torch.equal(one[name], two[name]) for name in theta)
    assert all(torch.equal(alone._sums[name], disturbed._sums[name]) for name in theta)
    assert alone.coverage.trainers() == disturbed.coverage.trainers()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_another_precision_count_as_what_they_are(dtype):
    mean = MaskedMean({"w": torch.zeros(3)})
    mean.add({"w": torch.tensor([1.5, -2.0, 0.25], dtype=dtype)})
    assert mean.result()["w"].tolist() == [1.5, -2.0, 0.25]


HEAVY = 2**24


@pytest.mark.parametrize("workers", [1, 2, 10, 1000, 100_000])
def test_every_number_of_workers_leaves_room_for_values_up_to_64_at_every_weight(workers):
    for weight in (1, 50, 60_000, HEAVY):
        mean = MaskedMean({"w": torch.zeros(3)}, workers, HEAVY)
        mean.add({"w": torch.tensor([63.9, -63.9, 0.05])}, weight=weight)
        # a value is rounded once, to 2^(s - 41) / w, and again to float32
        rounding = 64 * HEAVY * workers * 2.0 ** (18 - 64 + 1) / weight
        expected = torch.tensor([63.9, -63.9, 0.05])
        assert (mean.result()["w"] - expected).abs().max() <= rounding + 4e-6
        # as many as announced can do the same, and the sums stay below 2^63
        assert int(mean._sums["w"].abs().max()) * workers < 2**63


below_64 = st.floats(-64, 64, width=32, exclude_min=True, exclude_max=True)
weighted = st.lists(st.tuples(below_64, st.integers(1, HEAVY)), min_size=1, max_size=8)


@given(updates=weighted, workers=st.sampled_from([8, 10, 300, 5000]), order=st.randoms())
def test_means_weighted_by_examples_are_exact_to_one_rounding_in_any_order(updates, workers, order):
    def mean_of(updates):
        mean = MaskedMean({"w": torch.zeros(1)}, workers, HEAVY)
        for value, weight in updates:
            mean.add({"w": torch.tensor([value])}, weight=weight)
        return mean.result()["w"]

    total = sum(weight for _, weight in updates)
    exact = float(sum(Fraction(value) * weight for value, weight in updates) / total)
    shift = math.ceil(math.log2(workers * HEAVY * 64 / 2**23))
    rounding = len(updates) * 2.0 ** (shift - 41) / total
    ulp = float(np.spacing(np.float32(abs(exact))))
    first = mean_of(updates)
    assert abs(float(first) - exact) <= rounding + ulp
    assert torch.equal(first, mean_of(order.sample(updates, len(updates))))


def test_a_limit_of_ours_is_told_apart_from_a_fault_of_the_client():
    def refused(value, **keywords):
        mean = MaskedMean({"w": torch.zeros(1)}, workers=4, **keywords)
        with pytest.raises(UpdateError) as caught:
            mean.add({"w": torch.tensor([value])})
        return caught.value.strike, caught.value.diverged

    assert refused(3e6) == (False, True)  # beyond a quarter of the range, within the whole
    assert refused(1e7) == (True, True)
    assert refused(math.nan) == (True, True)
    full = MaskedMean({"w": torch.zeros(1)}, workers=1)
    full.add({"w": torch.zeros(1)})
    with pytest.raises(UpdateError, match="no room") as caught:
        full.add({"w": torch.zeros(1)})
    assert not caught.value.strike
    with pytest.raises(UpdateError, match="names differ") as caught:
        MaskedMean({"w": torch.zeros(1)}).add({})
    assert caught.value.strike
