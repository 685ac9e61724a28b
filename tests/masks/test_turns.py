"""Balanced masks by magnitude: the largest Gamma, the least norm lost, and shared out evenly."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.families.check import check_family
from fed_diffusion.masks.mask import Scattered, pruning_error
from fed_diffusion.masks.plan import known_ratios
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.turns import as_fraction, deal, deal_all, masks_of
from tests.tiny import planned

THETA = {
    "a.weight": torch.randn(60, 50, generator=torch.Generator().manual_seed(1)),
    "b.weight": 0.3 * torch.randn(40, 30, generator=torch.Generator().manual_seed(2)),
}
SIZES = {name: value.numel() for name, value in THETA.items()}
ratios = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=10)


def config_of(keeps, **more):
    pruning = {"kind": "balanced", "by": "magnitude", "scope": "all", "keep": keeps} | more
    settings = {f"pruning.{name}": value for name, value in pruning.items()}
    return load_config("digits", settings | {"clients": len(keeps)})


def plan(keeps, round=1, theta=THETA, **more):
    config = config_of(keeps, **more)
    family = family_of(config.pruning, config.seed)
    recipes = planned(config, round, theta)
    return [derive(family, recipe, theta) for recipe in recipes.values()]


def coverage(masks):
    found = Coverage(THETA, len(masks))
    for mask in masks:
        found.add(mask)
    return found


def w2(masks):
    return max(pruning_error(mask, THETA) for mask in masks)


@given(
    magnitude=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=5),
    drops=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_no_masks_of_this_gamma_and_these_ratios_lose_less(magnitude, drops):
    """Against all masks that there are."""
    size = len(magnitude)
    counts = [min(k, size) for k in drops]
    keeps = [Fraction(size - k, size) for k in counts]
    found = deal(np.array(magnitude, np.float32), keeps, np.zeros(len(keeps)))
    dropped = np.array([~found.mask(worker) for worker in range(len(keeps))])
    assert dropped.sum(1).tolist() == counts
    times = -(-sum(counts) // size)
    assert dropped.sum(0).max() <= times
    squares = np.array(magnitude, np.float64) ** 2
    least = min(
        sum(squares[list(part)].sum() for part in parts)
        for parts in itertools.product(
            *(itertools.combinations(range(size), count) for count in counts)
        )
        if max(np.bincount([i for part in parts for i in part], minlength=size)) <= times
    )
    assert (dropped @ squares).sum() == pytest.approx(least, rel=1e-12, abs=1e-12)


@given(keeps=ratios, round=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_ratios_are_kept_exactly_and_gamma_is_that_of_balanced_masks_or_more(keeps, round):
    masks = plan(keeps, round)
    for keep, mask in zip(keeps, masks, strict=True):
        for name, size in SIZES.items():
            dropped = size - mask[name].count() if name in mask else 0
            assert 0 <= (1 - keep) * size - dropped + 1e-2 < 1 + 2e-2
    assert coverage(masks).gamma() >= coverage(plan(keeps, round, by="chance")).gamma()


@given(keeps=ratios)
@settings(max_examples=25, deadline=None)
def test_they_lose_at_most_what_balanced_masks_and_random_ones_lose(keeps):
    mine = w2(plan(keeps))
    total = sum(float(value.double().square().sum()) for value in THETA.values())
    # random masks lose this much in the mean; the smallest blocks leave a thousandth uneven
    assert mine <= 1.001 * (1 - min(keeps)) * total
    drawn = max(w2(plan(keeps, round, by="chance")) for round in (1, 2, 3))
    assert mine <= 1.05 * drawn + 1e-9


def test_a_ratio_is_the_fraction_that_was_written():
    assert as_fraction(0.8) == Fraction(4, 5)
    assert as_fraction(1 / 3) == Fraction(1, 3)
    (mask, _) = plan([0.8, 1.0])
    assert [mask[name].count() for name in THETA] == [2400, 960]


def test_equal_workers_lose_alike_and_only_the_smallest():
    masks = plan([1.0, 0.8, 0.8, 0.8])[1:]
    lost = [pruning_error(mask, THETA) for mask in masks]
    assert max(lost) < 1.002 * min(lost)
    for name, value in THETA.items():
        dropped = sum(~mask[name].bools for mask in masks)
        assert int(dropped.max()) == 1
        assert float(value.abs()[dropped > 0].max()) <= float(value.abs()[dropped == 0].min())


def test_unequal_workers_come_as_near_to_each_other_as_the_weakest_allows():
    """It drops its smallest weights, and nobody who drops fewer loses more."""
    keeps = [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    lost = [pruning_error(mask, THETA) for mask in plan(keeps)]
    alone = pruning_error(plan([0.125], kind="topk", by="chance")[0], THETA)
    assert lost[-2:] == pytest.approx([alone, alone], rel=2e-3)
    assert max(lost[2:8]) < 1.02 * min(lost[2:8])
    assert max(lost) == max(lost[-2:])
    assert coverage(plan(keeps)).gamma() == 5


@pytest.mark.parametrize("per", ["tensor", "global"])
def test_each_of_equal_workers_drops_each_of_the_weights_equally_often(per):
    """Three workers that drop a half: of every three rounds two or one, the same for all three."""
    rounds = [plan([0.5] * 3, round, per=per) for round in (1, 2, 3)]
    for name in THETA:
        often = [sum((~masks[c][name].bools).int() for masks in rounds) for c in range(3)]
        assert torch.equal(often[0], often[1])
        assert torch.equal(often[1], often[2])
        assert int(often[0].max()) == 2


def test_of_the_whole_network_the_smallest_go_whatever_their_tensor():
    (mask,) = plan([0.5], per="global")
    size = torch.cat([value.abs().flatten() for value in THETA.values()])
    kept = torch.cat([mask[name].bools.flatten() for name in THETA])
    assert int(kept.sum()) == 2100
    assert float(size[~kept].max()) <= float(size[kept].min())


@pytest.mark.parametrize("per", ["tensor", "global"])
def test_they_keep_to_the_contract_of_a_family(per):
    config = config_of([0.5, 0.5, 0.3, 0.9], per=per)
    family = family_of(config.pruning, config.seed)
    check_family(family, "balanced", known_ratios(config.pruning, config.clients), THETA, None)
    recipes = planned(config, 1, THETA)
    assert all(recipe.needs_bits for recipe in recipes.values())
    (recipe, *_) = recipes.values()
    masks = dict(family.derive(recipe, THETA, None))
    bools = masks["b.weight"].bools.clone()
    bools[bools.nonzero()[0][0]] = False
    with pytest.raises(RecipeError, match="the bits drop"):
        family.check_bits(recipe, masks | {"b.weight": Scattered(bools)}, THETA)


def test_masks_follow_a_theta_that_has_changed():
    """The deal is remembered for the clients of a round, and for no other values."""
    config = config_of([0.5, 0.5])
    family = family_of(config.pruning, config.seed)
    theta = {name: value.clone() for name, value in THETA.items()}
    (recipe, _) = family.plan(1, {0: 0.5, 1: 0.5}, theta, None).values()
    first = family.derive(recipe, theta, None)
    assert family.derive(recipe, theta, None) == first
    theta["a.weight"].mul_(torch.linspace(0, 1, 50))
    again = family.derive(recipe, theta, None)
    assert again != first
    fresh = family_of(config.pruning, config.seed)
    assert fresh.derive(recipe, {n: v.clone() for n, v in theta.items()}, None) == again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratios": (1, 2)}, "not ratios of workers"),
        ({"ratios": (3, 2, 1)}, "not ratios of workers"),
        ({"ratios": (1, 2, 1 << 40)}, "not ratios of workers"),
        ({"place": 2}, "no worker with keep"),
        ({"ratios": (1, 3, 2)}, "no worker with keep"),
        ({"by": "chance"}, "by = 'chance'"),
    ],
)
def test_a_recipe_of_no_mask_is_refused(options, says):
    config = config_of([0.5, 0.5])
    given = {"unit": "weights", "by": "magnitude", "scope": "all", "per": "tensor"}
    given |= {"ratios": (1, 2, 2), "place": 1} | options
    with pytest.raises(RecipeError, match=says):
        family_of(config.pruning, 0).derive(Recipe("balanced", 0.5, options=given), THETA, None)


def test_magnitude_is_for_balanced_weights_alone():
    for wrong in ({"kind": "topk"}, {"unit": "channels"}):
        with pytest.raises(ConfigError, match="by: magnitude needs kind balanced"):
            config_of([0.75], **wrong)


def test_tensors_of_any_size_are_dealt_out_even_where_nothing_can_be_dropped():
    theta = {"one": torch.ones(1), "none": torch.zeros(0), "two": torch.tensor([1.0, -1.0])}
    keeps = [Fraction(1, 2)] * 3
    masks = [masks_of(deal_all(theta, keeps, "tensor"), theta, worker) for worker in range(3)]
    assert [[int(mask[n].sum()) for n in theta] for mask in masks] == [[1, 0, 1]] * 3
