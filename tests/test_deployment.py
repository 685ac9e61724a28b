"""Flower's deployment engine on loopback, with real processes killed by real signals."""

import inspect
import json
import re
import signal
import threading
import time

import pytest
import torch

from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from fed_diffusion.engines.flower import stage_app
from fed_diffusion.engines.local import simulate
from fed_diffusion.generate import RunDir
from tests.data.test_own import save
from tests.deployment import Deployment
from tests.server.test_faults import spoiled
from tests.tiny import TINY

pytestmark = pytest.mark.slow
TINY = TINY | {"evaluation.every": 0}


def run_config(path, **settings):
    pairs = " ".join(f"{key}={value}".replace(" ", "") for key, value in (TINY | settings).items())
    return f"preset='digits' run-dir='{path}' set='{pairs}'"


def lines_of(path):
    found = path / "metrics.jsonl"
    return [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []


def status_of(path):
    return json.loads((path / "status.json").read_text())


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def in_background(flower, config):
    thread = threading.Thread(target=flower.run, args=(config, 600))
    thread.start()
    return thread


def test_nodes_say_in_their_own_config_what_they_keep(tmp_path):
    path = tmp_path / "run"
    chosen = {"pruning.kind": "channels", "pruning.budget": "node", "model.group": 4}
    with Deployment(tmp_path / "flwr") as flower:
        for partition, config in enumerate(({}, {"keep": 0.5}, {"keep": 7.0})):
            flower.start_node(partition, 3, **config)
        flower.wait_for_nodes(3)
        printed = flower.run(run_config(path, clients=4, rounds=2, **chosen))
    assert "its keep = 7" in printed  # that node cannot be used, and its client takes no part
    assert RunDir(path).results()["method"] == "C-FedDM-node"
    line = lines_of(path)[-1]
    kept = {client["client"]: client["keep"] for client in line["clients"]}
    assert kept[0] == kept[3] == 1.0
    assert 0.4 < kept[1] <= 0.5
    assert 2 not in kept
    budgets = json.loads((path / "budgets.json").read_text())
    assert {client: budget["keep"] for client, budget in budgets.items()} == {
        "0": 1.0,
        "1": 0.5,
        "3": 1.0,
    }


def test_nodes_train_on_the_folders_that_their_own_configs_name(tmp_path):
    """Nobody else has their images; one whose images do not fit is left out, and it says why."""
    path, digits = tmp_path / "run", load_dataset(load_config("digits").data)
    save(tmp_path / "a", digits.images[:40])
    save(tmp_path / "b", digits.images[40:70])
    save(tmp_path / "wrong", digits.images[:5].repeat(1, 1, 2, 2))
    with Deployment(tmp_path / "flwr") as flower:
        for partition, folder in enumerate(("a", "b", "wrong")):
            flower.start_node(partition, 3, **{"data-dir": f'"{tmp_path / folder}"'})
        flower.wait_for_nodes(3)
        printed = flower.run(run_config(path, clients=3, rounds=2, **{"data.holdout": 0.1}))
    assert "has 40 images of its own" in printed
    assert "16x16 pixels" in printed
    line = lines_of(path)[-1]
    assert [client["client"] for client in line["clients"]] == [0, 1]
    (refusal,) = line["rejected"]
    assert refusal["client"] == 2
    assert "16x16 pixels" in refusal["reason"]


def test_a_node_killed_and_a_node_stopped_in_a_round_cost_their_updates_only(tmp_path):
    """One is gone for good, one is silent past a deadline and comes back."""
    path = tmp_path / "run"
    settings = {"clients": 4, "rounds": 5, "local.steps": 100, "round.deadline_s": 40}
    with Deployment(tmp_path / "flwr") as flower:
        for partition in range(4):
            flower.start_node(partition, 4)
        flower.wait_for_nodes(4)
        running = in_background(flower, run_config(path, **settings))
        wait_until(lambda: len(lines_of(path)) == 1)
        flower.signal_node(3, signal.SIGKILL)
        flower.signal_node(2, signal.SIGSTOP)
        wait_until(lambda: len(lines_of(path)) == 2)
        flower.signal_node(2, signal.SIGCONT)
        running.join()
    assert status_of(path)["state"] == "finished"
    lines = lines_of(path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    came = [{client["client"] for client in line["clients"]} for line in lines]
    assert came[0] == {0, 1, 2, 3}
    assert came[1] == {0, 1}
    assert came[4] >= {0, 1, 2}  # back again
    assert all(3 not in clients for clients in came[1:])
    missing = [{r["client"] for r in line["rejected"]} | set(line["absent"]) for line in lines]
    assert all(3 in clients for clients in missing[1:])
    reasons = [r["reason"] for r in lines[1]["rejected"]]
    assert reasons
    assert all(r["node"] for r in lines[1]["rejected"])


def test_below_its_quorum_a_run_stops_and_the_command_it_names_resumes_it(tmp_path):
    path = tmp_path / "run"
    settings = {"clients": 3, "rounds": 3, "local.steps": 100}
    settings |= {"round.deadline_s": 30, "round.retries": 1, "round.quorum": 2}
    with Deployment(tmp_path / "flwr") as flower:
        for partition in range(3):
            flower.start_node(partition, 3)
        flower.wait_for_nodes(3)
        running = in_background(flower, run_config(path, **settings))
        wait_until(lambda: len(lines_of(path)) == 1)
        for partition in (1, 2):
            flower.signal_node(partition, signal.SIGKILL)
        running.join()
        status = status_of(path)
        assert status["state"] == "stopped"
        assert "2 are needed (round.quorum)" in status["reason"]
        listed = flower.flwr("ls", "loopback", "--format", "json").stdout
        assert "finished:failed" in listed
        for partition in (1, 2):
            flower.start_node(partition, 3)
        wait_until(lambda: flower.online() >= 3)
        flower.run(f"resume='{path}'")
    assert status_of(path)["state"] == "finished"
    assert [line["round"] for line in lines_of(path)] == [1, 2, 3]
    command = re.search(r"fed-diffusion deploy run OPERATOR --resume (\S+)", status["reason"])
    assert command[1] == str(path)


def test_a_serverapp_killed_three_times_ends_with_the_bits_of_a_run_left_alone(tmp_path):
    # rounds of seconds: the process is to be found before the run is over
    settings = {"clients": 2, "rounds": 6, "local.steps": 200, "method": "T-FedDM-M"}
    simulate(load_config("digits", TINY | settings), tmp_path / "alone", processes=1)
    path = tmp_path / "run"
    config = run_config(path, **settings)
    moments = {
        "training": lambda: len(lines_of(path)) == 1,
        "just after a line was written": lambda: len(lines_of(path)) == 2,
        "while a checkpoint is written": lambda: (
            len(lines_of(path)) >= 3 or any(path.glob(".checkpoint-*"))
        ),
    }
    with Deployment(tmp_path / "flwr") as flower:
        for partition in range(2):
            flower.start_node(partition, 2)
        flower.wait_for_nodes(2)
        for condition in moments.values():
            running = in_background(flower, config)
            wait_until(condition)
            for process in flower.processes("flwr-serverapp"):
                process.kill()
            flower.stop_log_streams()
            running.join()
            assert not (path / "results.json").exists()
            config = f"resume='{path}'"
        flower.run(config)
    assert status_of(path)["state"] == "finished"
    one, two = (RunDir(p).load_checkpoint().tensors for p in (tmp_path / "alone", path))
    for group in ("theta", "ema"):
        for name, value in one[group].items():
            assert torch.equal(value, two[group][name])
    assert [line["round"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6]


def test_a_node_keeps_one_worker_process_and_gets_a_new_one_when_it_is_killed(tmp_path):
    """Killed in a task it costs that update only, with the reason; it ends with its SuperNode."""
    path = tmp_path / "run"
    settings = {"clients": 2, "rounds": 6, "local.steps": 400, "round.quorum": 1}
    with Deployment(tmp_path / "flwr") as flower:

        def workers():
            return {p.pid: p for p in flower.processes("client_app.warm")}

        for partition in range(2):
            flower.start_node(partition, 2)
        flower.wait_for_nodes(2)
        running = in_background(flower, run_config(path, **settings))
        wait_until(lambda: len(lines_of(path)) == 1)
        first = workers()
        assert len(first) == 2
        wait_until(lambda: len(lines_of(path)) == 2)
        assert workers().keys() == first.keys()
        victim = next(iter(first.values()))
        before = victim.cpu_times().user
        wait_until(lambda: victim.cpu_times().user > before + 0.3)  # it is in a task
        victim.kill()
        running.join()
        assert victim.pid not in workers()
        assert len(workers()) == 2
        for partition in range(2):
            flower.signal_node(partition, signal.SIGTERM)
        wait_until(lambda: not workers())
    lines = lines_of(path)
    assert status_of(path)["state"] == "finished"
    (line,) = [line for line in lines if line["rejected"]]
    (refusal,) = line["rejected"]
    assert "died in this task" in refusal["reason"]
    assert all(len(it["clients"]) == 2 for it in lines if it is not line)


def test_clients_that_raise_or_lie_cost_their_own_updates_and_are_named(tmp_path):
    faults = ["fine", "raises", "nan", "wrong shape", "wrong recipe", "huge", "nothing"]
    path, app = tmp_path / "run", tmp_path / "app"
    settings = {"clients": len(faults), "rounds": 2, "round.quorum": 1}
    settings |= {"round.norm_factor": 100, "round.ban_after": 1}
    stage_app(app, load_config("digits", TINY))
    (app / "client_app" / "app.py").rename(app / "client_app" / "honest.py")
    (app / "client_app" / "app.py").write_text(LIARS.format(faults) + inspect.getsource(spoiled))
    with Deployment(tmp_path / "flwr") as flower:
        for partition in range(2):  # a node hosts clients: odd ones here, even ones there
            flower.start_node(partition, 2)
        flower.wait_for_nodes(2)
        flower.run(run_config(path, **settings), app=app)
    assert status_of(path)["state"] == "finished"
    first, second = lines_of(path)
    assert [client["client"] for client in first["clients"]] == [0]
    reasons = {line["client"]: line["reason"] for line in first["rejected"]}
    assert reasons.keys() == set(range(1, len(faults)))
    said = ["broken by design", "not finite", "is sent with shape", "recipe", "its difference is"]
    for client, words in enumerate(said, start=1):
        assert words in reasons[client]
    assert all(line["node"] for line in first["rejected"])
    assert [client["client"] for client in second["clients"]] == [0]
    assert {2, 3, 4, 5} <= set(first["banned"])
    theta = RunDir(path).load_checkpoint().tensors["theta"]
    assert all(bool(torch.isfinite(value).all()) for value in theta.values())


LIARS = """
import math

import numpy as np
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from client_app import honest, work
from client_app.messages import to_records, to_task
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import Payload

FAULTS = {}
app = ClientApp()
app.query()(honest.hello)


@app.train()
def train(message, context):
    task = to_task(message.content)
    fault = FAULTS[task.client]
    if fault == "raises":
        raise RuntimeError("broken by design")
    update = work.worker_of(message.content, context.node_config).run(task)
    if fault == "nothing":
        return Message(RecordDict(), reply_to=message)
    return Message(to_records(spoiled(update, fault)), reply_to=message)


"""
