"""The two engines give the same bits, and a client that fails costs its own update. Real Flower."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image

from fed_diffusion.cli.main import main
from fed_diffusion.config import load_config
from fed_diffusion.engines.flower import run_on_flower
from fed_diffusion.engines.local import simulate
from fed_diffusion.generate import RunDir
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]


def config_of(**overrides):
    settings = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("digits", settings)


def theta_of(path):
    run = RunDir.open(path)
    return {f"{ema}{n}": v for ema in (0, 1) for n, v in run.load_theta(ema=bool(ema)).items()}


def same_bits(a, b):
    one, two = theta_of(a), theta_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The run without Flower."""
    path = tmp_path_factory.mktemp("local") / "run"
    simulate(config_of(method="T-FedDM-M", theory__every=1), path, processes=1)
    return path


def test_a_flower_run_and_an_in_process_run_end_with_the_same_bits(by_hand, tmp_path):
    lines = []
    config = config_of(method="T-FedDM-M", theory__every=1, flower__supernodes=2)
    assert run_on_flower(config, tmp_path / "run", progress=lines.append) == 0
    assert same_bits(by_hand, tmp_path / "run")
    here, there = RunDir(by_hand).results(), RunDir(tmp_path / "run").results()
    counted = ("bytes_up", "bytes_down", "rejected")
    for key in ("loss", "gamma_star", "w2_max", "method", "theory", *counted):
        assert here[key] == there[key], key
    assert [line["round"] for line in lines] == [1, 2]


def test_small_networks_in_int8_are_the_same_bits_on_flower(tmp_path):
    """Channels by magnitude: their groups travel as lists, the values as scaled differences."""
    chosen = {"pruning__kind": "channels", "pruning__choice": "magnitude", "model__group": 4}
    wire = {"wire__down": "int8", "wire__up": "int8", "wire__differences": True}
    config = config_of(pruning__keep=[1, 1, 0.75, 0.5, 0.25], **chosen, **wire)
    simulate(config, tmp_path / "local", processes=1)
    assert run_on_flower(config, tmp_path / "flower") == 0
    assert same_bits(tmp_path / "local", tmp_path / "flower")
    here, there = (RunDir(tmp_path / name).results() for name in ("local", "flower"))
    assert (here["bytes_up"], here["bytes_down"]) == (there["bytes_up"], there["bytes_down"])
    assert here["rejected"] == there["rejected"] == 0


@pytest.mark.slow
def test_a_flower_run_is_its_own_until_every_process_of_it_has_ended(tmp_path, capsys):
    run = tmp_path / "run"
    settings = TINY | {"method": "T-FedDM-M", "theory.every": 1, "flower.supernodes": 2}
    pairs = [f"--set={key}={value}" for key, value in (settings | {"rounds": 40}).items()]
    command = [
        sys.executable,
        "-m",
        "fed_diffusion.cli.main",
        "run",
        "digits",
        "--engine",
        "flower",
    ]
    process = subprocess.Popen([*command, "--out", str(run), *pairs])
    try:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert main(["resume", str(run)]) == 2
        assert f"in use by process {process.pid} on " in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rounds"] = RunDir(run).load_checkpoint().state["round"] + 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    again = ["resume", str(run), "--engine", "flower"]
    for _ in range(100):  # the ServerApp outlives the command by a moment, and holds the run
        assert main(again) == 2
        if "--accept-changes" in (said := capsys.readouterr().err):
            break
        assert "in use by" in said
        time.sleep(0.2)
    assert main([*again, "--accept-changes"]) == 0
    rounds = RunDir(run).results()["rounds"]
    simulate(config_of(method="T-FedDM-M", theory__every=1, rounds=rounds), tmp_path / "local")
    assert same_bits(tmp_path / "local", run)


@pytest.mark.slow
def test_buffered_rounds_on_flower_move_theta_as_updates_come(tmp_path):
    buffered = {"round__mode": "buffered", "round__buffer": 2, "wire__differences": True}
    config = config_of(rounds=5, evaluation__every=0, **buffered)
    assert run_on_flower(config, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(len(line["clients"]) == 2 and not line["rejected"] for line in lines)
    assert max(line["staleness"] for line in lines) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("supernodes", [1, 10])
def test_the_number_of_supernodes_changes_no_bit(by_hand, tmp_path, supernodes):
    config = config_of(method="T-FedDM-M", flower__supernodes=supernodes)
    assert run_on_flower(config, tmp_path / "run") == 0
    assert same_bits(by_hand, tmp_path / "run")


def colour_folders(root):
    """Three clients with a folder each: black, white and black images."""
    for client, colour in (("a", 0), ("b", 255), ("c", 0)):
        (root / client).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), colour).save(root / client / f"{i}.png")


NET = """
import torch
class Net(torch.nn.Module):
    '''Trains on black images and breaks on white ones.'''
    def __init__(self, model, channels, size, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(channels, channels, 1, 1))
    def forward(self, x, u, labels=None):
        if self.training and x.mean() > 0:
            raise RuntimeError("white images break this network")
        return torch.nn.functional.conv2d(x, self.weight)
"""


def test_a_client_that_raises_costs_its_own_update(tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    colour_folders(tmp_path / "images")
    config = config_of(
        model__name="fragile:Net",
        clients=3,
        evaluation__every=0,
        evaluation__reference="none",
        **{f"data__{k}": v for k, v in {"name": "image_folder", "dir": str(tmp_path / "images"),
           "size": 8, "channels": 1, "partition": "folders", "holdout": 0.0}.items()},
    )  # fmt: skip
    assert run_on_flower(config, tmp_path / "run") == 0
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        round = json.loads(line)
        assert [c["client"] for c in round["clients"]] == [0, 2]
        assert [r["client"] for r in round["rejected"]] == [1]
        assert "white images break this network" in round["rejected"][0]["reason"]
    assert RunDir(tmp_path / "run").results()["gamma_star"] == 2


@pytest.fixture
def flwr_home(tmp_path):
    """Flower's own local SuperLink, started by `flwr run` and ended here."""
    home = tmp_path / "flwr"
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"],
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39391",
        "FLWR_LOCAL_CONTROL_API_PORT": "39393",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    yield environment
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gamma"), [("R-FedDM-S", 6), ("T-FedDM-M", 6)])
def test_plain_flwr_run_trains_on_its_two_supernodes(flwr_home, tmp_path, method, gamma):
    run = tmp_path / "run"
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    small = " ".join(
        f"{k}={v}".replace(" ", "") for k, v in TINY.items() if k not in ("clients", "rounds")
    )
    given = f"preset='digits' method='{method}' rounds=3 run-dir='{run}' set='{small}'"
    subprocess.run(
        [sys.executable, flwr, "run", str(ROOT), "--stream", "--run-config", given],
        env=flwr_home,
        check=True,
        timeout=300,
        capture_output=True,
    )
    for _ in range(100):  # --stream may return before the last file is written
        if (run / "status.json").exists():
            break
        time.sleep(0.1)
    results = RunDir(run).results()
    assert results["method"] == method
    assert results["rounds"] == 3
    assert results["gamma_star"] == gamma  # of 13,000 coordinates, some are dropped by all four
    assert RunDir(run).config().pruning.level == method[-1]
