"""Secure aggregation on Flower's engines: on Ray, and on loopback with nodes that are killed."""

import json
import re

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
NODES = 4
SETTINGS = {key.replace("__", "."): value for key, value in FAST.items()}
SETTINGS |= {"clients": NODES, "method": "R-FedDM-S"}
SECURE = {"secure.aggregation": True, "secure.least": 1, "round.deadline_s": 60}
KILLING = """
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
    if message.content["about"]["client"] in KILLED and stage == STAGE:
        above = psutil.Process().parents()
        (node,) = [one for one in above if "flower-supernode" in " ".join(one.cmdline())]
        for process in [node, *node.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
    return honest.train(message, context)
"""
LYING = """
from flwr.app import Message
from flwr.clientapp import ClientApp

from client_app import honest

LIES = {1: (3, "secure:vector"), 2: (4, "secure:opened")}
app = ClientApp()
app.query()(honest.hello)


@app.train()
def train(message, context):
    about, stage = message.content["about"], message.content["metrics"]["secure.stage"]
    client, (where, part) = about["client"], LIES[about["round"]]
    reply = honest.train(message, context)
    if (client, stage) != (2, where):
        return reply
    from client_app.messages import to_records, to_update  # torch, for this one process alone
    from fed_diffusion.protocol.codecs import Packed

    update = to_update(reply.content)
    size = len(update.payload.arrays[part].data) - (8 if stage == 3 else 0)
    update.payload.arrays[part] = Packed("bytes", (size,), bytes(size))
    return Message(to_records(update), reply_to=message)
"""


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    """One deployment for all of these; `all_there` brings nodes back that a test has killed."""
    with Deployment(tmp_path_factory.mktemp("flwr")) as deployment:
        yield deployment


def all_there(flower):
    for partition in range(NODES):
        there = flower.nodes.get(partition)
        if there is None or there.poll() is not None:
            flower.start_node(partition, NODES)
    flower.wait_for_nodes(NODES)


def staged(app, code):
    """The application, with other code in front of its clients."""
    stage_app(app, load_config("digits", TINY))
    (app / "client_app" / "app.py").rename(app / "client_app" / "honest.py")
    (app / "client_app" / "app.py").write_text(code)
    return app


def config_of(settings):
    return load_config("digits", TINY | settings)


def run_config(path, settings):
    pairs = " ".join(f"{key}={value}".replace(" ", "") for key, value in (TINY | settings).items())
    return f"preset='digits' run-dir='{path}' set='{pairs}'"


def same_theta(one, other):
    thetas = [RunDir.open(path).load_theta(ema=False) for path in (one, other)]
    return all(torch.equal(value, thetas[1][name]) for name, value in thetas[0].items())


def status_of(path):
    return json.loads((path / "status.json").read_text())


def lines_of(path):
    return [json.loads(text) for text in (path / "metrics.jsonl").open()]


METHODS = ["R-FedDM-S", "FedDM-F", "T-FedDM-S", "C-FedDM-S"]
INT8 = {"wire.up": "int8", "wire.differences": "true"}


def test_a_run_on_a_deployment_ends_with_the_bits_of_a_plain_one_in_process(tmp_path, flower):
    settings = SETTINGS | {"method": "T-FedDM-S"}
    run(config_of(settings), tmp_path / "plain")
    all_there(flower)
    said = flower.run(run_config(path := tmp_path / "run", settings | SECURE))
    assert status_of(path)["state"] == "finished", said
    assert same_theta(tmp_path / "plain", path)
    (line,) = lines_of(path)
    assert len(line["clients"]) == NODES


@pytest.mark.parametrize(("stage", "method"), zip(Stage, METHODS, strict=True))
def test_a_node_killed_in_any_exchange_leaves_the_bits_of_a_plain_run_without_it(
    tmp_path, flower, stage, method
):
    gone = () if stage == Stage.OPEN else (3,)  # whoever has sent its vector counts
    settings = SETTINGS | {"method": method}
    run(config_of(settings), tmp_path / "plain", plain_without=gone)
    code = KILLING.replace("KILLED", "(3,)").replace("STAGE", str(int(stage)))
    app, path = staged(tmp_path / "app", code), tmp_path / "run"
    all_there(flower)
    said = flower.run(run_config(path, settings | SECURE), app=app)
    assert status_of(path)["state"] == "finished", said
    assert same_theta(tmp_path / "plain", path)
    (line,) = lines_of(path)
    assert {entry["client"] for entry in line["rejected"]} == set(gone)


def test_with_too_few_nodes_left_a_run_stops_and_goes_on_as_it_says_when_they_are_back(
    tmp_path, flower
):
    """Two of four have sent their vectors and are killed: of three shares that are needed, two."""
    whole = SETTINGS | {"method": "FedDM-F"}
    run(config_of(whole), tmp_path / "plain")
    code = KILLING.replace("KILLED", "(2, 3)").replace("STAGE", str(int(Stage.OPEN)))
    app, path = staged(tmp_path / "app", code), tmp_path / "run"
    all_there(flower)
    least = {"secure.least": 3, "round.retries": 1}
    said = flower.run(run_config(path, whole | SECURE | least), app=app)
    assert "3 shares of client 0's secrets are needed" in said
    status = status_of(path)
    assert status["state"] == "stopped", said
    assert "2 clients have sent keys, and a sum of fewer than secure.least = 3" in status["reason"]
    assert "tried 2 times" in status["reason"]
    command = re.search(r"fed-diffusion deploy run OPERATOR --resume (\S+)", status["reason"])
    assert command[1] == str(path)
    all_there(flower)
    said = flower.run(f"resume='{path}'")
    assert status_of(path)["state"] == "finished", said
    assert same_theta(tmp_path / "plain", path)


def test_a_node_that_sends_a_wrong_share_or_a_short_vector_is_named_and_costs_one_try_at_most(
    tmp_path, flower
):
    """A short vector in round 1 and wrong shares in round 2; here neither costs another try."""
    settings = SETTINGS | INT8 | {"rounds": 2}
    run(config_of(settings), tmp_path / "plain", plain_without={1: (2,)})
    app, path = staged(tmp_path / "app", LYING), tmp_path / "run"
    all_there(flower)
    said = flower.run(run_config(path, settings | SECURE), 600, app)
    assert status_of(path)["state"] == "finished", said
    lines = lines_of(path)
    counted = [[client["client"] for client in line["clients"]] for line in lines]
    assert counted == [[0, 1, 3], [0, 1, 2, 3]]
    named = [entry for line in lines for entry in line["rejected"]]
    assert [(entry["client"], entry["fault"]) for entry in named] == 2 * [(2, "node")]
    assert "its vector has" in named[0]["reason"]
    assert "are not those it was given" in named[1]["reason"]
    assert "there is no sum" not in said
    assert same_theta(tmp_path / "plain", path)


@pytest.mark.parametrize("supernodes", [2, 5])
def test_a_run_on_ray_ends_with_the_bits_of_a_plain_one_in_process(tiny, tmp_path, supernodes):
    """Clients that share a SuperNode each keep a memory of their own there."""
    settings = FAST | {"method": "T-FedDM-S", "rounds": 2}
    run(tiny(**settings), tmp_path / "plain")
    own = {"secure__aggregation": True, "secure__least": 1, "flower__supernodes": supernodes}
    assert run_on_flower(tiny(**settings, **own), tmp_path / "run") == 0
    assert same_theta(tmp_path / "plain", tmp_path / "run")
    assert RunDir(tmp_path / "run").results()["rejected"] == 0
