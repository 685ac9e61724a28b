"""Balanced masks of single weights."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.config import load_config
from fed_diffusion.masks.mask import kept_fraction, pruning_error
from fed_diffusion.masks.scattered import WORD, balanced_starts, dropped_length
from tests.masks.recipes import masks_of
from tests.tiny import planned

THETA = {
    "a.weight": torch.randn(60, 50, generator=torch.Generator().manual_seed(1)),
    "b.weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(2)),
}


def plan(keeps, round=1, kind="balanced"):
    config = load_config(
        "digits",
        {
            "pruning.kind": kind,
            "pruning.keep": keeps,
            "clients": len(keeps),
            "pruning.scope": "all",
        },
    )
    recipes = planned(config, round, THETA)
    return [masks_of(recipe, THETA) for recipe in recipes.values()]


def coverage(masks):
    mean = MaskedMean(THETA)
    for mask in masks:
        mean.add(THETA, mask)
    return mean.coverage


ratios = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=10)


@given(keeps=ratios, round=st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_gamma_is_the_largest_that_the_ratios_permit(keeps, round):
    """With D = sum(1 - keep) every coordinate is dropped floor(D) or ceil(D) times."""
    dropped = sum(dropped_length(keep) for keep in keeps)
    cover = coverage(plan(keeps, round)).counts()
    for counts in cover.values():
        assert int(counts.min()) >= len(keeps) - -(-dropped // WORD)
        assert int(counts.max()) <= len(keeps) - dropped // WORD


@given(keeps=ratios)
def test_the_dropped_intervals_lie_end_to_end(keeps):
    starts, end = balanced_starts(dict(enumerate(keeps)))
    here = 0
    for client, keep in enumerate(keeps):
        assert starts[client] == here
        assert 0 <= 1 - keep - dropped_length(keep) / WORD < 2**-31
        here = (here + dropped_length(keep)) % WORD
    assert end == here


def test_every_worker_keeps_about_its_ratio():
    keeps = [1.0, 0.75, 0.5, 0.25]
    for keep, masks in zip(keeps, plan(keeps), strict=True):
        assert abs(kept_fraction(masks, THETA) - keep) < 0.03


def test_where_not_all_must_be_dropped_it_is_the_smallest_that_are():
    masks = plan([1.0, 0.8, 0.8])
    for name, value in THETA.items():
        dropped = torch.zeros_like(value, dtype=torch.bool)
        for mask in masks[1:]:
            dropped |= ~mask[name].dense()
        count = int(dropped.sum())
        assert count == math.floor(value.numel() * 0.4 + 0.5)
        assert float(value.abs()[dropped].max()) <= float(value.abs()[~dropped].min())


def test_the_dropped_parts_are_disjoint_and_differ_between_rounds():
    first, second = plan([1.0, 0.8, 0.8], 1), plan([1.0, 0.8, 0.8], 2)
    for name in THETA:
        assert not bool((~first[1][name].dense() & ~first[2][name].dense()).any())
        assert first[1][name] != second[1][name]


def test_balanced_masks_lose_less_and_cover_more_than_random_ones():
    """Both factors of w^2 N / Gamma: the smallest weights go first, and to one worker at a time."""
    keeps = [1.0] * 6 + [0.75] * 4

    def bound(kind):
        masks = plan(keeps, kind=kind)
        w2 = max(pruning_error(mask, THETA) for mask in masks)
        return w2 * len(keeps) / coverage(masks).gamma()

    assert bound("balanced") < bound("random")
