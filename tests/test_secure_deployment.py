"""Secure aggregation on Flower's engines: on Ray, and on loopback with nodes that are killed."""

import json

import pytest
import torch

from fed_diffusion.config import load_config
from fed_diffusion.engines.flower import run_on_flower, stage_app
from fed_diffusion.generate import RunDir
from fed_diffusion.secure.messages import Stage
from tests.deployment import Deployment
from tests.secure.runs import FAST, run
from tests.tiny import TINY

pytestmark = pytest.mark.slow
KILLED = 3
KILLING = f"""
import os
import signal

import psutil
from flwr.clientapp import ClientApp

from client_app import honest

app = ClientApp()
app.query()(honest.hello)


@app.train()
def train(message, context):
    stage = message.content["metrics"]["secure.stage"]
    if (message.content["about"]["client"], stage) == ({KILLED}, STAGE):
        above = psutil.Process().parents()
        (node,) = [one for one in above if "flower-supernode" in " ".join(one.cmdline())]
        for process in [node, *node.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
    return honest.train(message, context)
"""


@pytest.mark.parametrize("stage", list(Stage))
def test_a_node_killed_in_any_exchange_leaves_the_bits_of_a_plain_run_without_it(
    tiny, tmp_path, stage
):
    settings = FAST | {"clients": 4, "method": "R-FedDM-S"}
    gone = () if stage == Stage.OPEN else (KILLED,)
    run(tiny(**settings), tmp_path / "plain", plain_without=gone)
    app, path = tmp_path / "app", tmp_path / "run"
    stage_app(app, load_config("digits", TINY))
    (app / "client_app" / "app.py").rename(app / "client_app" / "honest.py")
    (app / "client_app" / "app.py").write_text(KILLING.replace("STAGE", str(int(stage))))
    own = {"secure.aggregation": True, "secure.least": 1, "round.deadline_s": 60}
    own |= {key.replace("__", "."): value for key, value in settings.items()}
    pairs = " ".join(f"{key}={value}".replace(" ", "") for key, value in (TINY | own).items())
    with Deployment(tmp_path / "flwr") as flower:
        for partition in range(4):
            flower.start_node(partition, 4)
        flower.wait_for_nodes(4)
        said = flower.run(f"preset='digits' run-dir='{path}' set='{pairs}'", app=app)
    assert json.loads((path / "status.json").read_text())["state"] == "finished", said
    one, other = (RunDir.open(tmp_path / name).load_theta(ema=False) for name in ("plain", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (line,) = [json.loads(text) for text in (path / "metrics.jsonl").open()]
    assert {entry["client"] for entry in line["rejected"]} == set(gone)


@pytest.mark.parametrize("supernodes", [2, 5])
def test_a_run_on_ray_ends_with_the_bits_of_a_plain_one_in_process(tiny, tmp_path, supernodes):
    """Clients that share a SuperNode each keep a memory of their own there."""
    settings = FAST | {"method": "T-FedDM-S", "rounds": 2}
    run(tiny(**settings), tmp_path / "plain")
    own = {"secure__aggregation": True, "secure__least": 1, "flower__supernodes": supernodes}
    assert run_on_flower(tiny(**settings, **own), tmp_path / "run") == 0
    one, other = (RunDir.open(tmp_path / name).load_theta(ema=False) for name in ("plain", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert RunDir(tmp_path / "run").results()["rejected"] == 0
