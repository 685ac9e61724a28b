"""Flower's deployment engine on loopback, with real processes."""

import json

import pytest

from fed_diffusion.runs import RunDir
from tests.deployment import Deployment
from tests.federation.conftest import TINY

SMALL = " ".join(f"{key}={value}".replace(" ", "") for key, value in TINY.items())


@pytest.mark.slow
def test_nodes_say_in_their_own_config_what_they_keep(tmp_path):
    with Deployment(tmp_path / "flwr") as flower:
        for partition, config in enumerate(({}, {"keep": 0.5}, {"keep": 7.0})):
            flower.start_node(partition, 3, **config)
        flower.wait_for_nodes(3)
        chosen = "pruning.kind=channels pruning.budget=node model.group=4 clients=4 rounds=2"
        printed = flower.run(f"preset='digits' run-dir='{tmp_path / 'run'}' set='{SMALL} {chosen}'")
    assert "its keep = 7" in printed  # that node cannot be used, and the two others host its client
    results = RunDir(tmp_path / "run").results()
    assert results["method"] == "C-FedDM-node"
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    kept = [client["keep"] for client in line["clients"]]
    assert kept[0] == kept[2] == 1.0
    assert 0.4 < kept[1] == kept[3] <= 0.5
    budgets = json.loads((tmp_path / "run/budgets.json").read_text())
    assert [budgets[str(client)]["keep"] for client in range(4)] == [1.0, 0.5, 1.0, 0.5]
