"""Tiny runs of every method family and mode: both engines agree, and the ledger counts what it did.

This is the reduced form of tests/guard_rails.py: what must hold on any machine. The slow test is
all of its table; its hashes are compared by hand, on one machine, before and after a change.
"""

import json

import pytest
import torch

from tests import guard_rails
from tests.guard_rails import FAMILIES, FLOWER, LOCAL, MODES, ConfigError, changed, digest

EXPECTED = json.loads(guard_rails.BYTES.read_text("utf-8"))
COMBINATIONS = [(family, mode) for family in FAMILIES for mode in MODES]
BOTH_ENGINES = [
    ("channels, ordered", "synchronous"),
    ("random", "buffered"),
    ("exclusive", "private, sampled"),
    ("channels, magnitude", "int8 differences"),
    ("small", "trimmed mean"),
]
IN_PROCESS = [
    ("FedDM-F", "buffered"),
    ("top-k", "buffered"),
    ("channels, rolling", "buffered"),
    ("channels, random", "private, sampled"),
    ("balanced weights", "buffered"),
    ("balanced channels", "private"),
]


@pytest.mark.parametrize(("family", "mode"), BOTH_ENGINES)
def test_both_engines_end_with_the_same_bits_and_the_bytes_that_are_expected(
    family, mode, tmp_path
):
    local = guard_rails.row_of(family, mode, LOCAL, tmp_path / "local")
    flower = guard_rails.row_of(family, mode, FLOWER, tmp_path / "flower")
    assert changed(local, flower) == []
    assert guard_rails.count_of(local) == EXPECTED[family][mode]


@pytest.mark.parametrize(("family", "mode"), IN_PROCESS)
def test_a_run_sends_the_bytes_that_are_expected(family, mode, tmp_path):
    row = guard_rails.row_of(family, mode, LOCAL, tmp_path / "run")
    assert guard_rails.count_of(row) == EXPECTED[family][mode]
    assert row["sum down"] == sum(row["bytes down"])
    assert row["sum up"] == sum(row["bytes up"])


def test_every_family_and_every_mode_is_run_by_the_suite():
    families, modes = (set(names) for names in zip(*BOTH_ENGINES, *IN_PROCESS, strict=True))
    assert families == set(FAMILIES)
    assert modes == set(MODES)
    assert {mode for _, mode in BOTH_ENGINES} == set(MODES) - {"private"}  # with a draw, it is


def test_bytes_are_expected_of_every_combination_that_is_not_refused():
    refused = set()
    for family, mode in COMBINATIONS:
        try:
            guard_rails.config_of(family, mode)
        except ConfigError:
            refused.add((family, mode))
    assert refused == {key for key in COMBINATIONS if EXPECTED[key[0]][key[1]] == "refused"}
    assert [(f, m) for f, modes in EXPECTED.items() for m in modes] == COMBINATIONS


@pytest.mark.parametrize("engine", [LOCAL, FLOWER])
def test_a_combination_that_is_refused_is_recorded_as_such_and_costs_no_run(engine, tmp_path):
    row = guard_rails.row_of("balanced weights", "private, sampled", engine, tmp_path / "run")
    assert row.keys() == {"refused"}
    assert "privacy.clip" in row["refused"]
    assert not (tmp_path / "run").exists()


def test_a_hash_changes_with_a_bit_a_name_a_type_or_a_shape_and_not_with_the_order():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])
    whole = digest({"a": one, "b": two})
    assert digest({"b": two, "a": one}) == whole
    others = [
        {"a": torch.tensor([1.0, -0.0]), "b": two},
        {"a": one, "c": two},
        {"a": one.view(torch.int32), "b": two},
        {"a": one, "b": two.flatten()},
        {"a": one},
    ]
    assert len({whole, *map(digest, others)}) == 1 + len(others)


KEY, OTHER = ("random", "buffered", LOCAL), ("random", "buffered", FLOWER)
ROW = {"theta": 64 * "a", "ema": 64 * "b", "bytes down": [7, 8], "bytes up": [5, 6]}


def test_a_record_that_is_read_back_differs_from_itself_in_nothing(tmp_path):
    rows = {KEY: ROW, OTHER: {"refused": "no"}}
    guard_rails.write(tmp_path / "record.json", rows)
    machine, read = guard_rails.read(tmp_path / "record.json")
    assert machine == guard_rails.machine()
    assert read == rows
    assert guard_rails.differences(rows, read) == []


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (ROW | {"theta": 64 * "c"}, ("theta", 12 * "a", 12 * "c")),
        (ROW | {"bytes up": [5, 7]}, ("bytes up", "[5, 6]", "[5, 7]")),
        (ROW | {"failed": "ValueError"}, ("failed", "-", "ValueError")),
        ({"refused": "a.key: why"}, ("refused", "-", "a.key: why")),
    ],
)
def test_what_differs_is_a_line_with_both_values(after, line):
    found = guard_rails.differences({KEY: ROW}, {KEY: after})
    assert (*KEY, *line) in found
    assert (*OTHER, *line) in guard_rails.disagreements({KEY: ROW, OTHER: after})
    for text in (*KEY, *line):
        assert text in guard_rails.table(("", "", "", "", "", ""), found)


def test_a_row_that_is_there_only_once_differs_and_a_refusal_in_other_words_does_not():
    assert len(guard_rails.differences({KEY: ROW}, {})) == len(ROW)
    assert len(guard_rails.differences({}, {KEY: ROW})) == len(ROW)
    assert guard_rails.differences({KEY: {"refused": "one"}}, {KEY: {"refused": "two"}}) == []


@pytest.mark.slow
def test_the_whole_table_holds_on_this_machine():
    rows = guard_rails.rows_of(guard_rails.combinations(ray=False))
    assert guard_rails.disagreements(rows) == []
    assert guard_rails.byte_counts(rows) == EXPECTED
    # two families that ended alike would guard one of them only
    local = [row for (_, _, engine), row in rows.items() if engine == LOCAL]
    ends = [row["theta"] for row in local if "theta" in row]
    assert len(set(ends)) == len(ends)
