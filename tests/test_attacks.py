"""A deployment under attack: a listed node that lies in each round, a stranger at the proxy."""

import json
import os
import shutil
import subprocess

import psutil
import pytest
import torch

from fed_diffusion.client.worker import Worker
from fed_diffusion.common.text import MOST
from fed_diffusion.config import load_config
from fed_diffusion.deploy import bundle
from fed_diffusion.engines.flower import stage_app
from fed_diffusion.engines.local import Exchange
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir
from tests import attacks
from tests.attacks import FORMS, MB, Watched
from tests.deployment import Deployment, free_port
from tests.test_deployment import lines_of, run_config, status_of
from tests.tiny import TINY

pytestmark = pytest.mark.slow


class Listed(Deployment):
    """With TLS and node authentication, and the server's list of keys: by `deploy init`'s files."""

    def __init__(self, home, nodes, clients):
        super().__init__(home)
        self.bundles = bundle.init(home / "made", bundle.Deployment(("127.0.0.1",), nodes))
        self.listed = self.bundles / "server/nodes.json"
        places = json.loads(self.listed.read_text())
        for entry in list(places.values())[:clients]:
            entry["num-partitions"] = clients
        self.listed.write_text(json.dumps(places))
        self.environment["FED_DIFFUSION_NODES"] = str(self.listed)
        self.ca = str(self.bundles / "operator/ca.crt")
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.ca}"\n'
        )

    def superlink_options(self):
        server = self.bundles / "server"
        return (
            *("--ssl-ca-certfile", str(server / "ca.crt")),
            *("--ssl-certfile", str(server / "server.crt")),
            *("--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth"),
        )

    def __enter__(self):
        super().__enter__()
        for key in sorted((self.bundles / "operator/nodes").iterdir()):
            done = self.flwr("supernode", "register", str(key), "loopback", "--name", key.stem)
            assert "registered successfully" in done.stdout, done.stdout + done.stderr
        return self

    def node_options(self, number):
        key = self.bundles / f"node-{number + 1}/node.key"
        return ("--root-certificates", self.ca, "--auth-supernode-private-key", str(key))


def alone(folder, config, without):
    """theta of the same run in which a client's updates never come."""
    experiment = Experiment(config, folder)
    worker = Worker(config, experiment.dataset)

    def run(tasks):
        for task in tasks:
            yield task, OSError("away") if task.client == without else worker.run(task)

    experiment.train(Exchange(experiment, run))
    return experiment.coordinator.theta


def test_a_listed_node_that_tries_everything_costs_its_own_updates_and_little_memory(tmp_path):
    """Theta is that of the run without it; another says that it is everybody and gets nothing."""
    path, app = tmp_path / "run", tmp_path / "app"
    settings = {"clients": 3, "rounds": len(FORMS), "round.ban_after": 0, "local.steps": 2}
    stage_app(app, load_config("digits", TINY))
    attacks.stage(app)
    with Listed(tmp_path / "flwr", nodes=4, clients=3) as flower:
        for node in (0, 1):
            flower.start_node(node, 3)
        flower.start_node(2, 3, attack=1)
        flower.start_node(3, 4, attack="'everybody'")
        flower.wait_for_nodes(4)
        with Watched(flower.processes, "flwr-serverapp", "flower-superlink") as watched:
            flower.run(run_config(path, **settings), timeout=600, app=app)
    print("MB", watched.first, watched.most, [line["seconds"] for line in lines_of(path)])
    assert status_of(path)["state"] == "finished"
    lines = lines_of(path)
    assert len(lines) == len(FORMS)
    for line, words in zip(lines, FORMS.values(), strict=True):
        assert [client["client"] for client in line["clients"]] == [0, 1]
        (entry,) = line["rejected"]
        assert (entry["client"], entry["fault"]) == (2, "node")
        assert words in entry["reason"]
        assert len(entry["reason"]) <= MOST
        (refused,) = line["refused"]
        assert "num-partitions=1" in refused["reason"]
        assert refused["node"] not in [c["node"] for c in line["clients"]] + [entry["node"]]
    assert (path / "metrics.jsonl").stat().st_size < 100_000
    assert b"\x1b" not in (path / "report.html").read_bytes()
    expected = alone(tmp_path / "alone", load_config("digits", TINY | settings), without=2)
    theta = RunDir(path).load_checkpoint().tensors["theta"]
    assert all(torch.equal(theta[name], value) for name, value in expected.items())
    assert watched.most["flwr-serverapp"] < 900


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (nginx-light)")
def test_a_stranger_with_unfinished_requests_costs_the_superlink_no_memory(tmp_path):
    """12 connections of 60 MB each took it from 286 to 966 MB; now the proxy keeps what comes."""
    port = free_port()
    with Listed(tmp_path / "flwr", nodes=1, clients=1) as flower:
        server = flower.bundles / "server"
        text = (server / "nginx.conf").read_text()
        text = text.replace("8443", str(port)).replace(":8000", f":{flower.port}")
        (server / "nginx.conf").write_text(text)
        (tmp_path / "proxy").mkdir()
        proxy = subprocess.Popen(
            [server / "proxy.sh"],
            env=flower.environment | {"STATE": str(tmp_path / "proxy")},
            start_new_session=True,
        )
        try:
            master = psutil.Process(proxy.pid)

            def processes(word):  # nginx writes over its environment
                return [master, *master.children()] if word == "nginx" else flower.processes(word)

            with Watched(processes, "flower-superlink", "nginx") as watched:
                ends = [
                    attacks.knock(port, 12, 60 * MB),  # refused by its announced length
                    attacks.knock(port, 12, 7 * MB),  # a part of a model that never ends
                    attacks.knock(port, 60, 7 * MB),
                ]
            taken = [sum(end()) / MB for end in ends]
        finally:
            os.killpg(proxy.pid, 15)
            proxy.wait(30)
    print("MB", watched.first, watched.most, taken)
    grown = watched.most["flower-superlink"] - watched.first["flower-superlink"]
    assert grown < 40
    assert watched.most["nginx"] < 100
    assert sum(taken[1:]) > 60  # it came that far, and waited on disk
