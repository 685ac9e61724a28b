"""How much of a network one liar decides on is said before training, and counted in every round."""

import json
import logging

import pytest
import torch

from fed_diffusion.build import Setup
from fed_diffusion.checks import check
from fed_diffusion.engines.local import simulate
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.server.defence import undefended_share

TRIMMED = {"round__aggregation": "trimmed_mean"}


def share(config):
    return undefended_share(Setup.of(config))


def remarks(config, digits, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check(config, digits)
    return [r.getMessage() for r in caplog.records if "one liar decides" in r.getMessage()]


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_two_clients_are_told_that_one_of_them_decides(tiny, digits, caplog, aggregation):
    (said,) = remarks(tiny(clients=2, round__aggregation=aggregation), digits, caplog)
    assert f"round.aggregation = '{aggregation}'" in said
    assert "In a round of 2 clients about 100 % of the coordinates" in said
    assert remarks(tiny(clients=3, round__aggregation=aggregation), digits, caplog) == []
    assert remarks(tiny(clients=2), digits, caplog) == []


def test_the_clients_of_one_round_count_and_not_those_of_the_run(tiny, digits, caplog):
    (said,) = remarks(tiny(clients=5, round__fraction=0.4, **TRIMMED), digits, caplog)
    assert "In a round of 2 clients about 100 %" in said


def test_under_masks_the_part_is_that_of_the_binomial_law(tiny):
    """Scope all, two whole workers and three that keep a half: 1/8 have no third trainer."""
    config = tiny(
        pruning__kind="random",
        pruning__keep=[1, 1, 0.5, 0.5, 0.5],
        pruning__scope="all",
        **TRIMMED,
    )
    assert share(config)[0] == pytest.approx(1 / 8, abs=0.02)
    balanced = tiny(
        pruning__kind="balanced",
        pruning__keep=[1, 1, 0.75, 0.75, 0.75],
        pruning__scope="all",
        **TRIMMED,
    )
    assert share(balanced) == (0.0, 5)


def test_nothing_is_claimed_where_the_nodes_say_their_ratios(tiny):
    assert share(tiny(pruning__kind="random", pruning__budget="node", **TRIMMED)) == (0.0, 0)


def test_the_record_and_the_report_count_the_coordinates_of_every_round(tiny, tmp_path):
    masks = {"pruning__kind": "channels", "pruning__keep": [1, 1, 0.6], "clients": 3}
    small = {"evaluation__every": 0, "local__steps": 1, "rounds": 1}
    results = simulate(tiny(**masks, **small, **TRIMMED), tmp_path / "run", processes=1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    for line in lines:
        assert line["undefended"] == line["coverage"]["2"] > 0
    assert results["undefended"] == max(line["undefended"] for line in lines)
    page = (tmp_path / "run/report.html").read_text()
    assert "had one or two trainers: there trimmed_mean can leave nobody out" in page


def test_a_mean_claims_to_withstand_nobody(tiny, digits):
    coordinator = Coordinator(tiny(), {"w": torch.zeros(2)})
    next(coordinator.tasks(1))
    coordinator.open.mean.add({"w": torch.ones(2)})
    summary = coordinator.ledger.close(coordinator.open, 1, clock=0.0, banned=[], theory=None)
    assert summary.undefended is None
