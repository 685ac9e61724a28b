"""A setting names what is built in, or any object of any module."""

import math

import pytest

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config import ConfigError

BUILT_IN = {"first": 1, "second": 2}


def test_a_built_in_name_comes_first_and_a_dotted_one_is_imported():
    assert resolve("some.key", "second", BUILT_IN) == 2
    assert resolve("some.key", "math:sqrt", BUILT_IN) is math.sqrt
    assert resolve("some.key", "datetime:datetime.now", BUILT_IN)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("secund", "Did you mean 'second'"),
        ("else", "Allowed: first, second"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("math:no_such_function", "no_such_function"),
        (":f", "is unknown"),
        ("math:", "is unknown"),
    ],
)
def test_what_a_setting_cannot_mean_is_refused_with_its_key(name, said):
    with pytest.raises(ConfigError, match=r"some\.key") as caught:
        resolve("some.key", name, BUILT_IN)
    assert said in str(caught.value)


def test_what_fails_in_a_users_part_is_named_with_its_line():
    def part():
        return {}["oops"]

    line = part.__code__.co_firstlineno + 1
    with (
        pytest.raises(ConfigError, match=r"some\.key = 'mine:part' failed with KeyError") as caught,
        blamed("some.key", "mine:part"),
    ):
        part()
    assert f"({__file__}, line {line})" in str(caught.value)
