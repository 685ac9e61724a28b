"""Masks from recipes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.config import load_config
from fed_diffusion.masks.families.weights import PER, SCOPES
from fed_diffusion.masks.mask import kept_fraction, pruning_error
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.scattered import top_k
from tests.masks.recipes import masks_of, recipe_of
from tests.tiny import planned

THETA = {
    "conv.weight": torch.linspace(-1, 1, 48).reshape(4, 3, 2, 2),
    "conv.bias": torch.ones(4),
    "time.weight": torch.ones(3, 3),
    "linear.weight": torch.linspace(2, -2, 30).reshape(5, 6),
}


@st.composite
def recipes(draw, kinds=("full", "random", "topk", "balanced")):
    kind = draw(st.sampled_from(kinds))
    return recipe_of(
        kind,
        1.0 if kind == "full" else draw(st.floats(0.01, 1.0)),
        seed=draw(st.integers(0, 2**62)),
        round=draw(st.integers(0, 10**6)),
        client=draw(st.integers(0, 10**5)),
        scope=draw(st.sampled_from(SCOPES)),
        per=draw(st.sampled_from(PER)),
        start=draw(st.integers(0, 2**32 - 1)),
        end=draw(st.integers(0, 2**32 - 1)),
    )


@given(recipe=recipes())
def test_both_ends_derive_the_same_mask_from_the_numbers_alone(recipe):
    again = Recipe.from_metrics(recipe.to_metrics())
    assert again == recipe
    here, there = masks_of(recipe, THETA), masks_of(again, {n: v.clone() for n, v in THETA.items()})
    assert here == there


@given(recipe=recipes(kinds=("random",)))
def test_random_masks_do_not_depend_on_thetas_values(recipe):
    other = {name: torch.randn_like(value) for name, value in THETA.items()}
    here, there = masks_of(recipe, THETA), masks_of(recipe, other)
    assert here == there


def test_random_masks_are_the_raw_philox_words_below_the_ratio():
    recipe = recipe_of("random", 0.7, seed=11, round=3, client=5)
    words = np.random.Philox(key=[11, 4], counter=[0, 0, 3, 5]).random_raw(78)
    kept = (words >> np.uint64(32)) < math.floor(0.7 * 2**32)
    mask = masks_of(recipe, THETA)
    np.testing.assert_array_equal(mask["conv.weight"].dense().flatten().numpy(), kept[:48])
    np.testing.assert_array_equal(mask["linear.weight"].dense().flatten().numpy(), kept[48:])


def test_different_clients_and_rounds_have_different_random_masks():
    big = {"w": torch.zeros(100, 100)}
    masks = [
        masks_of(recipe_of("random", 0.5, round=r, client=c), big)["w"].dense()
        for r in range(3)
        for c in range(3)
    ]
    for i, a in enumerate(masks):
        assert abs(float(a.float().mean()) - 0.5) < 0.03
        for b in masks[:i]:
            assert abs(float((a == b).float().mean()) - 0.5) < 0.03


def test_weights_scope_leaves_biases_and_time_embeddings_whole():
    assert set(masks_of(recipe_of("topk", 0.5), THETA)) == {"conv.weight", "linear.weight"}


def test_all_scope_masks_every_tensor():
    assert set(masks_of(recipe_of("topk", 0.5, scope="all"), THETA)) == set(THETA)


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
    mask = masks_of(recipe_of("topk", 0.25, per="global"), THETA)
    flat = torch.cat([THETA["conv.weight"].abs().flatten(), THETA["linear.weight"].abs().flatten()])
    kept = torch.cat([mask[n].dense().flatten() for n in ("conv.weight", "linear.weight")])
    assert int(kept.sum()) == math.floor(0.25 * 78 + 0.5)
    assert float(flat[kept].min()) >= float(flat[~kept].max())


def test_pruning_error_is_the_squared_norm_of_what_is_dropped():
    masks = masks_of(recipe_of("topk", 0.5), THETA)
    dropped = sum(((THETA[n].double() * ~m.dense()) ** 2).sum().item() for n, m in masks.items())
    assert pruning_error(masks, THETA) == pytest.approx(dropped, rel=1e-12)
    assert kept_fraction(masks, THETA) == pytest.approx(1 - 39 / 91)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"recipe.kind": 7}, "kind = 7"),
        ({"recipe.kind": "k" * 1000}, "kind has 1000 letters"),
        ({"recipe.kind": [1]}, r"kind = \[1\]"),
        ({"recipe.keep": 0.0}, "above 0 and at most 1"),
        ({"recipe.keep": 1.5}, "above 0 and at most 1"),
        ({"recipe.keep": float("nan")}, "above 0 and at most 1"),
        ({"recipe.keep": [0.5]}, "not readable"),
        ({"recipe.seed": -1}, "must not be negative"),
        ({"recipe.round": float("inf")}, "not readable"),
        ({"recipe.needs_bits": 2}, "needs_bits = 2"),
        ({"recipe.version": 2}, "recipe.version = 2, and this is 1"),
        ({"recipe.scope": True}, "neither a number nor a name"),
        ({"recipe.scope": float("nan")}, "neither a number nor a name"),
        ({"recipe.scope": [0.5]}, "not a list of whole numbers"),
        ({"recipe.scope": "s" * 1000}, "scope has 1000 letters"),
        ({"recipe.a b": 1}, "'a b' cannot be the name of an option"),
        ({f"recipe.o{i}": i for i in range(40)}, "41 options, more than 32"),
    ],
)
def test_an_illegal_recipe_from_the_wire_is_refused(change, says):
    with pytest.raises(RecipeError, match=f"recipe: .*{says}"):
        Recipe.from_metrics(recipe_of("random", 0.5).to_metrics() | change)


@pytest.mark.parametrize("name", ["version", "kind", "keep", "seed", "round", "client"])
def test_a_recipe_with_a_missing_part_is_refused(name):
    numbers = Recipe().to_metrics()
    del numbers[f"recipe.{name}"]
    with pytest.raises(RecipeError, match=rf"recipe\.{name} (is missing|= None)"):
        Recipe.from_metrics(numbers)


def test_a_recipe_travels_by_names_with_a_version_and_its_familys_options_alone():
    recipe = recipe_of("topk", 0.25, seed=5, round=3, client=9, per="global")
    assert recipe.to_metrics() == {
        "recipe.version": 1,
        "recipe.kind": "topk",
        "recipe.keep": 0.25,
        "recipe.seed": 5,
        "recipe.round": 3,
        "recipe.client": 9,
        "recipe.needs_bits": 1,
        "recipe.scope": "weights",
        "recipe.per": "global",
    }
    others = {"loss": 0.5, "images": 3}  # a reply carries more than the recipe
    assert Recipe.from_metrics(recipe.to_metrics() | others) == recipe


ODD = {
    "an unknown name": ("random", {"scope": "biases"}, "scope = 'biases'; allowed: weights, all"),
    "a number for a name": ("topk", {"scope": "all", "per": 0}, "per = 0; allowed: tensor, global"),
    "an option too few": ("topk", {"scope": "all"}, r"these differ: \['per'\]"),
    "another family's option": (
        "random",
        {"scope": "all", "per": "tensor"},
        r"these differ: \['per'\]",
    ),
    "a start beyond the circle": (
        "balanced",
        {"start": 2**32},
        "start = 4294967296; allowed: 0 to",
    ),
    "a start that is no whole number": ("balanced", {"start": 1.0}, "start = 1.0; allowed: 0 to"),
    "an end below the circle": ("balanced", {"end": -1}, "end = -1; allowed: 0 to 4294967295"),
}


@pytest.mark.parametrize("case", ODD)
def test_options_that_a_family_does_not_know_are_refused_when_the_mask_is_derived(case):
    kind, options, says = ODD[case]
    if kind == "balanced":
        options = dict(recipe_of("balanced", 0.5).options) | options
    recipe = Recipe(kind, 0.5, options=options)
    with pytest.raises(RecipeError, match=f"recipe: .*{says}"):
        masks_of(Recipe.from_metrics(recipe.to_metrics()), THETA)


def test_where_two_recipes_differ_is_said_by_name():
    one, two = recipe_of("random", 0.5, client=1), recipe_of("topk", 0.5, client=2)
    assert one.differences(two) == (
        "kind 'random' != 'topk', client 1 != 2, needs_bits False != True, per None != 'tensor'"
    )


def test_the_level_decides_each_clients_recipe():
    config = load_config("digits", {"method": "T-FedDM-M"})
    recipes = planned(config, 1, THETA)
    kinds = [(recipes[n].kind, recipes[n].keep) for n in range(10)]
    assert kinds == [("full", 1.0)] * 6 + [("topk", 0.8)] * 2 + [("topk", 0.75)] * 2
