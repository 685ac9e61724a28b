"""Masks from recipes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.config import load_config
from fed_diffusion.masks.mask import kept_fraction, pruning_error
from fed_diffusion.masks.plan import known_ratios, plan_round
from fed_diffusion.masks.recipe import (
    KINDS,
    PER,
    SCOPES,
    Recipe,
    RecipeError,
)
from fed_diffusion.masks.scattered import top_k

THETA = {
    "conv.weight": torch.linspace(-1, 1, 48).reshape(4, 3, 2, 2),
    "conv.bias": torch.ones(4),
    "time.weight": torch.ones(3, 3),
    "linear.weight": torch.linspace(2, -2, 30).reshape(5, 6),
}

recipes = st.builds(
    Recipe,
    kind=st.sampled_from([kind for kind in KINDS if kind != "channels"]),
    keep=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**62),
    round=st.integers(0, 10**6),
    client=st.integers(0, 10**5),
    scope=st.sampled_from(SCOPES),
    per=st.sampled_from(PER),
    start=st.integers(0, 2**32 - 1),
    end=st.integers(0, 2**32 - 1),
)


@given(recipe=recipes)
def test_both_ends_derive_the_same_mask_from_the_numbers_alone(recipe):
    again = Recipe.from_metrics(recipe.to_metrics())
    assert again == recipe
    here, there = recipe.mask(THETA), again.mask({n: v.clone() for n, v in THETA.items()})
    assert here == there


@given(recipe=recipes.filter(lambda r: r.kind == "random"))
def test_random_masks_do_not_depend_on_thetas_values(recipe):
    other = {name: torch.randn_like(value) for name, value in THETA.items()}
    here, there = recipe.mask(THETA), recipe.mask(other)
    assert here == there


def test_random_masks_are_the_raw_philox_words_below_the_ratio():
    recipe = Recipe(kind="random", keep=0.7, seed=11, round=3, client=5)
    words = np.random.Philox(key=[11, 4], counter=[0, 0, 3, 5]).random_raw(78)
    kept = (words >> np.uint64(32)) < math.floor(0.7 * 2**32)
    mask = recipe.mask(THETA)
    np.testing.assert_array_equal(mask["conv.weight"].dense().flatten().numpy(), kept[:48])
    np.testing.assert_array_equal(mask["linear.weight"].dense().flatten().numpy(), kept[48:])


def test_different_clients_and_rounds_have_different_random_masks():
    big = {"w": torch.zeros(100, 100)}
    masks = [
        Recipe(kind="random", keep=0.5, round=r, client=c).mask(big)["w"].dense()
        for r in range(3)
        for c in range(3)
    ]
    for i, a in enumerate(masks):
        assert abs(float(a.float().mean()) - 0.5) < 0.03
        for b in masks[:i]:
            assert abs(float((a == b).float().mean()) - 0.5) < 0.03


def test_weights_scope_leaves_biases_and_time_embeddings_whole():
    assert set(Recipe(kind="topk", keep=0.5).mask(THETA)) == {"conv.weight", "linear.weight"}


def test_all_scope_masks_every_tensor():
    assert set(Recipe(kind="topk", keep=0.5, scope="all").mask(THETA)) == set(THETA)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    keep=st.floats(0.01, 1.0),
)
def test_top_k_keeps_the_largest_with_ties_to_the_lower_index(values, keep):
    magnitude = [abs(v) for v in values]
    k = math.floor(keep * len(values) + 0.5)
    order = sorted(range(len(values)), key=lambda i: (-magnitude[i], i))
    mask = top_k(torch.tensor(magnitude, dtype=torch.float32), keep)
    assert sorted(torch.nonzero(mask).flatten().tolist()) == sorted(order[:k])


def test_global_top_k_compares_across_tensors():
    mask = Recipe(kind="topk", keep=0.25, per="global").mask(THETA)
    flat = torch.cat([THETA["conv.weight"].abs().flatten(), THETA["linear.weight"].abs().flatten()])
    kept = torch.cat([mask[n].dense().flatten() for n in ("conv.weight", "linear.weight")])
    assert int(kept.sum()) == math.floor(0.25 * 78 + 0.5)
    assert float(flat[kept].min()) >= float(flat[~kept].max())


def test_pruning_error_is_the_squared_norm_of_what_is_dropped():
    masks = Recipe(kind="topk", keep=0.5).mask(THETA)
    dropped = sum(((THETA[n].double() * ~m.dense()) ** 2).sum().item() for n, m in masks.items())
    assert pruning_error(masks, THETA) == pytest.approx(dropped, rel=1e-12)
    assert kept_fraction(masks, THETA) == pytest.approx(1 - 39 / 91)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe.kind": 7},
        {"recipe.keep": 0.0},
        {"recipe.keep": 1.5},
        {"recipe.keep": float("nan")},
        {"recipe.seed": -1},
        {"recipe.scope": 0.5},
    ],
)
def test_an_illegal_recipe_from_the_wire_is_refused(change):
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_metrics(Recipe().to_metrics() | change)


def test_a_recipe_with_a_missing_number_is_refused():
    numbers = Recipe().to_metrics()
    del numbers["recipe.keep"]
    with pytest.raises(RecipeError, match=r"recipe\.keep is missing"):
        Recipe.from_metrics(numbers)


def test_the_level_decides_each_clients_recipe():
    config = load_config("digits", {"method": "T-FedDM-M"})
    recipes = plan_round(config, 1, known_ratios(config), THETA)
    kinds = [(recipes[n].kind, recipes[n].keep) for n in range(10)]
    assert kinds == [("full", 1.0)] * 6 + [("topk", 0.8)] * 2 + [("topk", 0.75)] * 2
