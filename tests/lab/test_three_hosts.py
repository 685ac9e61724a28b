"""Three hosts, TLS and node authentication, each node its own folder: by the printed commands.

A fourth host is there for those that should not get in.
"""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from fed_diffusion.deploy.bundle import Deployment, init
from fed_diffusion.generate import RunDir
from tests.lab.hosts import why_not
from tests.lab.lab import PORT, PROGRAM, SERVER, Lab
from tests.tiny import TINY

pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(why_not()), reason=why_not() or "ready")]
STRANGER = 3


@pytest.fixture
def lab(tmp_path):
    with Lab(tmp_path) as running:
        yield running


def lines_of(path):
    found = path / "metrics.jsonl"
    return [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []


def settings(**more):
    quick = {key: value for key, value in TINY.items() if key != "model.conditional"}
    chosen = {"clients": 2, "rounds": 5, "local.steps": 20, "evaluation.every": 0}
    return quick | chosen | {key.replace("__", "."): value for key, value in more.items()}


def test_a_run_across_three_hosts_ends_with_a_report(lab, tmp_path):
    path = tmp_path / "run"
    code = lab.submit(path, **settings()).wait(600)
    assert code == 0, lab.read("train.log")
    assert RunDir(path).finished()
    assert (path / "report.html").is_file()
    lines = lines_of(path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert all([c["client"] for c in line["clients"]] == [0, 1] for line in lines)
    for node in (1, 2):
        bundle = lab.bundles / f"node-{node}"
        checked = lab.run(node, PROGRAM, "doctor", bundle)
        assert checked.returncode == 0, checked.stdout


def test_secret_sums_across_three_hosts_end_with_the_bits_of_plain_ones(lab, tmp_path):
    """Every exchange goes through TLS and the proxy, to nodes that each have their own images."""
    kinds = {"plain": {}, "secret": {"secure__aggregation": True, "secure__least": 1}}
    for name, more in kinds.items():
        code = lab.submit(tmp_path / name, **settings(rounds=2, **more)).wait(600)
        assert code == 0, lab.read("train.log")
        assert [[c["client"] for c in line["clients"]] for line in lines_of(tmp_path / name)] == [
            [0, 1],
            [0, 1],
        ]
    plain, secret = (RunDir.open(tmp_path / name).load_theta(ema=False) for name in kinds)
    assert all(torch.equal(value, secret[name]) for name, value in plain.items())


def test_flwr_run_by_the_printed_command_works(lab, tmp_path):
    from tests.deployment import ROOT

    pairs = " ".join(f"{k}={v}".replace(" ", "") for k, v in settings(rounds=2).items())
    config = f"preset='digits' run-dir='{tmp_path / 'run'}' set='{pairs}'"
    what = ("run", ROOT, "deployment", "--stream", "--run-config", config)
    lab.operator("flwr.sh", *what, timeout=600)
    assert RunDir(tmp_path / "run").finished()


def test_a_link_that_is_cut_for_a_minute_costs_rounds_of_that_node_only(lab, tmp_path):
    path = tmp_path / "run"
    given = settings(rounds=12, local__steps=60, round__deadline_s=40, round__quorum=1)
    training = lab.submit(path, **given)
    lab.wait_for(lambda: len(lines_of(path)) >= 1)
    lab.cut(2)
    time.sleep(60)
    lab.mend(2)
    assert training.wait(900) == 0, lab.read("train.log")
    lines = lines_of(path)
    assert len(lines) == 12
    alone = [line for line in lines if [c["client"] for c in line["clients"]] == [0]]
    assert alone
    assert all(1 in line["absent"] or line["rejected"] for line in alone)


def test_a_node_that_is_gone_for_good_does_not_end_the_run(lab, tmp_path):
    path = tmp_path / "run"
    given = settings(round__deadline_s=40, round__quorum=1, local__steps=60)
    training = lab.submit(path, **given)
    lab.wait_for(lambda: len(lines_of(path)) >= 1)
    lab.stop(lab.nodes[2], signal.SIGKILL)
    assert training.wait(900) == 0, lab.read("train.log")
    assert [c["client"] for c in lines_of(path)[-1]["clients"]] == [0]


def test_a_superlink_that_is_killed_and_started_again_goes_on_with_the_run(lab, tmp_path):
    path = tmp_path / "run"
    training = lab.submit(path, **settings(local__steps=60, round__deadline_s=90))
    lab.wait_for(lambda: len(lines_of(path)) >= 1)
    lab.stop(lab.superlink, signal.SIGKILL)
    time.sleep(5)
    lab.restart_superlink()
    assert training.wait(900) == 0, lab.read("train.log")
    assert [line["round"] for line in lines_of(path)] == [1, 2, 3, 4, 5]


def test_a_node_that_is_killed_in_a_round_comes_back_by_itself(lab, tmp_path):
    path = tmp_path / "run"
    given = settings(rounds=12, local__steps=60, round__deadline_s=60, round__quorum=1)
    training = lab.submit(path, **given)
    lab.wait_for(lambda: len(lines_of(path)) >= 1)
    lab.stop(lab.nodes[2], signal.SIGKILL)
    lab.nodes[2] = lab.start_node(2)
    assert training.wait(900) == 0, lab.read("train.log")
    assert {1} <= {client["client"] for client in lines_of(path)[-1]["clients"]}


def test_who_should_not_get_in_does_not_and_is_told_why(lab, tmp_path):
    other = init(tmp_path / "other", Deployment((lab.address(SERVER),), 1, PORT))
    # a key that is not listed, with the right CA
    shutil.copy(lab.bundles / "node-1/ca.crt", other / "node-1/ca.crt")
    unlisted = lab.run(
        STRANGER,
        "timeout",
        "60",
        other / "node-1/supernode.sh",
        PORT="9194",
        STATE=str(tmp_path / "s"),
    )
    assert unlisted.returncode != 0
    assert "2004" in unlisted.stdout + unlisted.stderr
    assert "has not" in unlisted.stderr  # our own words before Flower's
    # a certificate of another CA
    another = init(tmp_path / "another", Deployment((lab.address(SERVER),), 1, PORT))
    checked = lab.run(STRANGER, PROGRAM, "doctor", another / "node-1")
    assert checked.returncode == 1
    assert "certificate is not one of" in checked.stdout
    # plain text
    plain = lab.run(STRANGER, "curl", "-s", f"http://{lab.address(SERVER)}:{PORT}/health")
    assert "plain HTTP request was sent to HTTPS port" in plain.stdout
    assert lab.online() == 2


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("health", "200"),
        ("v1/fleet/pull-messages", "405"),  # the SuperLink's own answer to a GET
        ("v1/control/list-nodes", "403"),
        ("v1/runtime/acquire-task", "403"),
        ("docs", "403"),
        ("openapi.json", "403"),
        ("v1/fleet/%2e%2e/control/list-nodes", "403"),
        ("v1/fleet/..%2fcontrol/list-nodes", "403"),
        ("v1/fleet/%252e%252e/control/list-nodes", "403"),
        ("v1//control/list-nodes", "403"),
    ],
)
def test_nodes_reach_the_fleets_paths_and_no_other(lab_for_reading, path, status):
    lab = lab_for_reading
    url = f"https://{lab.address(SERVER)}:{PORT}/{path}"
    ca = lab.bundles / "node-1/ca.crt"
    what = ("-s", "-o", os.devnull, "-w", "%{http_code}", "--path-as-is", "--cacert", ca, url)
    assert lab.run(1, "curl", *what).stdout == status
    direct = ("-s", "-m", "3", "--cacert", ca, f"https://{lab.address(SERVER)}:8000/health")
    assert lab.run(1, "curl", *direct).returncode != 0  # the SuperLink itself is out of reach


@pytest.fixture(scope="module")
def lab_for_reading(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as running:
        yield running
