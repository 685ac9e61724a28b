"""Which channel groups a worker keeps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.masks import channels
from fed_diffusion.masks.mask import Block, kept_fraction
from fed_diffusion.masks.plan import check_pruning
from fed_diffusion.masks.recipe import Recipe, RecipeError
from tests.masks.recipes import masks_of, recipe_of
from tests.tiny import planned

SMALL = {"model.widths": [16, 32], "model.group": 4, "pruning.kind": "channels"}
CONFIG = load_config("digits", SMALL | {"pruning.keep": 0.5})
LAYOUT = Setup.of(CONFIG).layout
THETA = parameters_of(build_network(CONFIG))
RATIOS = st.sampled_from((1.0, 0.75, 0.5, 0.25))


def plan(round=1, theta=THETA, **pruning):
    overrides = SMALL | {f"pruning.{key}": value for key, value in pruning.items()}
    config = load_config("digits", overrides | {"clients": len(overrides["pruning.keep"])})
    return planned(config, round, theta, LAYOUT)


def blocks_of(recipe):
    masks = masks_of(recipe, THETA, LAYOUT)
    return masks, {n: m.take(THETA[n]) for n, m in masks.items()} | {
        n: v for n, v in THETA.items() if n not in masks
    }


def kept_groups(recipe):
    """By space, from the rows of the tensors that end in it."""
    masks = masks_of(recipe, THETA, LAYOUT)
    found = {}
    for name, axes in LAYOUT.axes.items():
        if len(axes[0]) == 1 and name in masks:
            (space,) = axes[0]
            size = LAYOUT.spaces[space].size
            rows = [i for start, stop in masks[name].runs[0] for i in range(start, stop)]
            found[space] = sorted({row // size for row in rows})
    return found


@pytest.mark.parametrize("choice", channels.CHOICES)
@given(keep=RATIOS, round=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_both_ends_derive_the_same_channels_from_the_numbers_alone(choice, keep, round):
    recipe = plan(round, keep=[1, keep], choice=choice)[1]
    again = Recipe.from_metrics(recipe.to_metrics())
    assert again == recipe
    # the client has names and shapes only
    shapes = {name: torch.empty(value.shape, device="meta") for name, value in THETA.items()}
    here, there = masks_of(recipe, THETA, LAYOUT), masks_of(again, shapes, LAYOUT)
    assert here == there
    assert all(isinstance(mask, Block) for mask in here.values())


def test_ordered_channels_are_nested():
    small, large = (masks_of(plan(keep=[1, keep])[1], THETA, LAYOUT) for keep in (0.25, 0.6))
    for name, block in small.items():
        inside = large[name].dense() if name in large else torch.ones(block.shape, dtype=torch.bool)
        assert bool((block.dense() <= inside).all())


def test_a_rolling_window_visits_every_group_and_moves_by_one():
    windows = [
        kept_groups(plan(round, keep=[1, 0.25], choice="rolling")[1]) for round in range(1, 9)
    ]
    for space, definition in LAYOUT.spaces.items():
        seen = [set(window[space]) for window in windows if space in window]
        assert set().union(*seen) == set(range(definition.groups))
        for before, after in pairwise(seen):
            assert after == {(group + 1) % definition.groups for group in before}


def test_random_channels_differ_between_clients_and_rounds():
    kept = {
        str(kept_groups(plan(round, keep=[1, 0.5, 0.5], choice="random")[client]))
        for round in (1, 2, 3)
        for client in (1, 2)
    }
    assert len(kept) == 6


def test_magnitude_keeps_the_groups_of_largest_norm():
    theta = {name: value.clone() for name, value in THETA.items()}
    name = "down.0.block.conv1.weight"
    theta[name][8:12] += 10  # the third group of this block's hidden channels
    recipe = plan(theta=theta, keep=[1, 0.25], choice="magnitude")[1]
    rows = [
        i
        for start, stop in masks_of(recipe, theta, LAYOUT)[name].runs[0]
        for i in range(start, stop)
    ]
    assert rows[-4:] == [8, 9, 10, 11] or set(range(8, 12)) <= set(rows)
    space = "down.0.block.hidden"
    square = (
        theta[name].double().square().sum((1, 2, 3))
        + theta["down.0.block.conv1.bias"].double().square()
        + theta["down.0.block.conv2.weight"].double().square().sum((0, 2, 3))
        + theta["down.0.block.time.weight"].double().square().sum(1)
    )
    for part in ("time.bias", "norm2.weight", "norm2.bias"):
        square += theta[f"down.0.block.{part}"].double().square()
    norms = channels.group_norms(LAYOUT, theta)[space]
    torch.testing.assert_close(norms, square.view(-1, 4).sum(1))


@given(keeps=st.lists(RATIOS, min_size=2, max_size=8), round=st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_balanced_channels_drop_every_group_nearly_equally_often(keeps, round):
    recipes = plan(round, kind="balanced", unit="channels", keep=keeps)
    for space, definition in LAYOUT.spaces.items():
        dropped = torch.zeros(definition.groups, dtype=torch.int64)
        total = 0
        for client, recipe in recipes.items():
            kept = kept_groups(recipe).get(space, list(range(definition.groups)))
            expected = definition.groups - LAYOUT.counts(keeps[client])[space]
            assert definition.groups - len(kept) == expected
            dropped += 1
            dropped[kept] -= 1
            total += expected
        assert int(dropped.max()) == -(-total // definition.groups)
        assert int(dropped.max() - dropped.min()) <= 1


def test_what_a_balanced_worker_drops_goes_round():
    rounds = [plan(r, kind="balanced", unit="channels", keep=[1, 1, 0.75, 0.75]) for r in (1, 2, 3)]
    assert len({recipes[2].options["groups"] for recipes in rounds}) > 1


def test_balanced_channels_have_at_least_the_gamma_of_any_other_choice():
    keeps = [1, 1, 1, 1, 1, 1, 0.75, 0.75, 0.75, 0.75]

    def gamma(**pruning):
        mean = MaskedMean(THETA)
        for recipe in plan(keep=keeps, **pruning).values():
            masks, values = blocks_of(recipe)
            mean.add(values, masks)
        return mean.coverage.gamma()

    balanced = gamma(kind="balanced", unit="channels")
    others = [gamma(choice=choice) for choice in channels.CHOICES]
    assert balanced > max(others) >= 6


@pytest.mark.parametrize("choice", channels.CHOICES)
def test_the_actual_ratio_is_at_most_the_asked_for_one_and_near_it(choice):
    for keep in (0.75, 0.5, 0.25):
        actual = kept_fraction(
            masks_of(plan(keep=[1, keep], choice=choice)[1], THETA, LAYOUT), THETA
        )
        assert keep - 0.1 < actual <= keep


BAD_GROUPS = {
    "a group the model lacks": (lambda g: (99, *g[1:]), r"has groups 0 to \d+, not all of"),
    "a negative group": (lambda g: (-1, *g[1:]), r"has groups 0 to"),
    "too few groups": (lambda g: g[1:], r"\d+ groups are named, but the ratio means"),
    "no groups": (lambda g: (), r"0 groups are named"),
    "groups out of order": (lambda g: (g[1], g[0], *g[2:]), "not in ascending order"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_recipe_of_groups_that_the_model_cannot_have_is_refused(case):
    change, message = BAD_GROUPS[case]
    numbers = plan(keep=[1, 0.5], choice="magnitude")[1].to_metrics()
    numbers["recipe.groups"] = list(change(tuple(numbers["recipe.groups"])))
    with pytest.raises(RecipeError, match=message):
        masks_of(Recipe.from_metrics(numbers), THETA, LAYOUT)


def test_groups_that_are_no_whole_numbers_are_refused():
    numbers = Recipe().to_metrics() | {"recipe.groups": [0.5]}
    with pytest.raises(RecipeError, match="not a list of whole numbers"):
        Recipe.from_metrics(numbers)


def test_channels_of_an_unknown_network_are_refused():
    with pytest.raises(RecipeError, match="channel spaces are not known"):
        masks_of(recipe_of("channels", 0.5), THETA)
    own = load_config("digits", {"pruning.kind": "channels", "model.name": "torch.nn:Identity"})
    with pytest.raises(ConfigError, match=r"pruning\.kind = 'channels'|model\.name"):
        _ = Setup.of(own).layout


REFUSED = {
    "a ratio below one group": ({"pruning.keep": 0.01}, "below the smallest sub-network"),
    "exclusive without weak workers": (
        {"pruning.kind": "random", "pruning.baseline": "exclusive"},
        "every worker has the whole network",
    ),
    "exclusive without strong workers": (
        {"pruning.kind": "random", "pruning.baseline": "exclusive", "pruning.keep": 0.5},
        "none has it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ratios_that_cannot_be_used_are_refused_before_training(case):
    overrides, message = REFUSED[case]
    config = load_config("digits", SMALL | overrides)
    with pytest.raises(ConfigError, match=message):
        check_pruning(config.pruning, config.clients, Setup.of(config).layout)
