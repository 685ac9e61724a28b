"""Texts that others wrote: whatever is in them, a terminal, a record and a page show one line."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.common.text import MOST, clean, shown


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("its keep = 7", "its keep = 7"),
        ("\x1b]0;owned\x07fine", "fine"),
        ("\x1b]0;owned\x1b\\fine", "fine"),
        ("\x9d0;owned\x9cfine", "fine"),
        ("\x1b]8;;http://evil\x07click\x1b]8;;\x07", "click"),
        ("\x1b[31mred\x1b[0m \x9b2Jgone", "red gone"),
        ("\x1bP1$r0m\x1b\\fine", "fine"),
        ("\x1b(0\x1bcfine", "fine"),
        ("\x1b]0;never ended", ""),
        (
            "one\nINFO : round 3/3\r\n  two\u2028three\x85four",
            "one | INFO : round 3/3 | two | three | four",
        ),
        ("a\tb\x00c\x7fd\x84e", "a b?c?d?e"),
        ("abc\u202edcba\u2066x\u200f\ufeff", "abc?dcba?x??"),
        ("half \ud800 of one", "half ? of one"),
        ("Größe, 尺寸, 🙂", "Größe, 尺寸, 🙂"),
        (ValueError("five\x1b[2J"), "five"),
    ],
)
def test_what_is_shown_of_a_text(text, left):
    assert clean(text) == left
    assert clean(left) == left


def test_a_page_keeps_its_lines_and_tabs_and_shows_no_control():
    page = "<p>\n\tGrößé\n</p>\r\x1b[2J\u202e\udce9\x85"
    assert shown(page) == "<p>\n\tGrößé\n</p>??[2J???"
    assert shown("plain\n") == "plain\n"


def test_of_a_long_text_the_beginning_and_the_end_are_left():
    text = clean("begin " + "x" * 5_000_000 + " end")
    assert len(text) == MOST
    assert text.startswith("begin ")
    assert text.endswith(" end")
    assert len(clean("é" * 101, 100)) == 100
    assert clean("é" * 100, 100) == "é" * 100


@given(st.text(st.characters(exclude_categories=()), max_size=80), st.integers(20, 60))
def test_any_text_becomes_one_line_that_can_be_encoded_and_stays_as_it_is(text, most):
    left = clean(text, most)
    assert len(left) <= most
    assert not {unicodedata.category(c) for c in left} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    left.encode("utf-8")
    assert clean(left, most) == left
