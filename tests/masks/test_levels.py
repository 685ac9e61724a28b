"""The paper's levels for any number of workers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.masks.levels import level_ratios


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("F", [1.0] * 10),
        ("L", [1.0] * 8 + [0.75] * 2),
        ("M", [1.0] * 6 + [0.80] * 2 + [0.75] * 2),
        ("S", [1.0] * 6 + [0.75] * 4),
    ],
)
def test_ten_workers_get_the_levels_of_appendix_d(level, expected):
    assert list(level_ratios(level, 10)) == expected


PAPER = {"F": [(1, 10)], "L": [(1, 8), (0.75, 2)], "M": [(1, 6), (0.8, 2), (0.75, 2)]}
PAPER["S"] = [(1, 6), (0.75, 4)]


@given(level=st.sampled_from("FLMS"), n=st.integers(1, 50))
def test_every_level_gives_each_worker_a_ratio_in_order_and_within_one_of_its_share(level, n):
    ratios = level_ratios(level, n)
    assert len(ratios) == n
    assert list(ratios) == sorted(ratios, reverse=True)
    for keep, tenths in PAPER[level]:
        assert abs(ratios.count(keep) - Fraction(tenths, 10) * n) < 1


@given(level=st.sampled_from("LMS"))
def test_a_single_worker_is_full(level):
    assert level_ratios(level, 1) == (1.0,)


def test_a_tie_goes_to_the_larger_keep_ratio():
    # M at N = 2: exact shares 1.2, 0.4, 0.4; the one left over goes to 0.80, not to 0.75
    assert level_ratios("M", 2) == (1.0, 0.80)
