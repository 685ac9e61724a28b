"""A run that is killed at any moment and resumed ends with the bits of one that was left alone."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.generate import RunDir
from fed_diffusion.store.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.tiny import TINY

SETTINGS = TINY | {"rounds": 4, "evaluation.every": 0, "method": "T-FedDM-M"}

# a run in a process of its own that kills itself with a real signal at a chosen moment
DRIVER = """
import os, signal, sys
from pathlib import Path
import fed_diffusion.store.checkpoint as checkpoint
from fed_diffusion.config import load_config
from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.engines.local import simulate
from fed_diffusion.generate import RunDir
from fed_diffusion.client.worker import Worker

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def after(count, function):
    calls = []
    def wrapped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == count:
            die()
        return function(*arguments, **keywords)
    return wrapped

moment, path, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3])
if moment == "training":
    Worker._train = after(8, Worker._train)  # in the second round of five clients
elif moment == "aggregating":
    MaskedMean.result = after(2, MaskedMean.result)
elif moment == "writing the line":
    RunDir.append_metrics = after(2, RunDir.append_metrics)
elif moment == "writing tensors":
    checkpoint.save_tensors = after(6, checkpoint.save_tensors)  # the second round's average
elif moment == "swapping":
    rename = Path.rename
    Path.rename = after(6, rename)  # of the second round: the newest is moved, no new one is there
elif moment == "evaluating":
    import fed_diffusion.finish as finish
    finish._evaluate = die
simulate(load_config("digits", settings), path, processes=1)
"""


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    simulate(load_config("digits", SETTINGS), path, processes=1)
    return path


def same_end(a, b):
    """Parameters, moving average and everything in the results but times."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    for group in ("theta", "ema"):
        assert one.tensors[group].keys() == two.tensors[group].keys()
        for name, value in one.tensors[group].items():
            assert torch.equal(value, two.tensors[group][name]), name
    results = [RunDir(path).results() for path in (a, b)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    lines = [[json.loads(line) for line in (p / "metrics.jsonl").open()] for p in (a, b)]
    assert [line["round"] for line in lines[0]] == [line["round"] for line in lines[1]]


MOMENTS = [
    "training",
    "aggregating",
    "writing the line",
    "writing tensors",
    "swapping",
    "evaluating",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_it_was(moment, untouched, tmp_path):
    path = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", DRIVER, moment, str(path), repr(SETTINGS)])
    assert killed.returncode == -signal.SIGKILL
    assert not (path / "status.json").exists()
    run_in_process(Experiment.resume(path), processes=1)
    same_end(untouched, path)


def test_a_run_resumed_by_another_engine_size_ends_alike(untouched, tmp_path):
    path = tmp_path / "run"
    subprocess.run([sys.executable, "-c", DRIVER, "aggregating", str(path), repr(SETTINGS)])
    run_in_process(Experiment.resume(path), processes=2)
    same_end(untouched, path)


def test_what_a_limit_learned_and_who_was_banned_is_not_forgotten(tmp_path):
    config = load_config("digits", SETTINGS | {"round.norm_factor": 50})
    experiment = Experiment(config, tmp_path / "run")
    experiment.coordinator.participation.strikes = {3: 5}
    with pytest.raises(KeyboardInterrupt):
        run_in_process(experiment, processes=1, progress=stop_after(2))
    resumed = Experiment.resume(tmp_path / "run")
    assert resumed.coordinator.round == 2
    assert resumed.coordinator.participation.banned() == [3]
    assert resumed.coordinator.norms.recent == experiment.coordinator.norms.recent != []
    assert resumed.coordinator.participants(3) == [0, 1, 2, 4]


def stop_after(round):
    def progress(line):
        if line["round"] == round:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_saves_its_last_round_even_between_checkpoints(untouched, tmp_path):
    config = load_config("digits", SETTINGS | {"round.checkpoint_every": 3})
    with pytest.raises(KeyboardInterrupt):
        run_in_process(Experiment(config, tmp_path / "run"), processes=1, progress=stop_after(2))
    assert load_checkpoint(tmp_path / "run").state["round"] == 2
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    run_in_process(Experiment.resume(tmp_path / "run"), processes=1)
    assert load_checkpoint(tmp_path / "run").state["round"] == 4
    same_end(untouched, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_a_checkpoint_and_the_way_back(untouched, tmp_path, number):
    path = tmp_path / "run"
    pairs = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "fed_diffusion.cli", "run", "digits", "--out", str(path)]
    process = subprocess.Popen([*command, *pairs], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"fed-diffusion resume {path}" in printed
    done = subprocess.run([sys.executable, "-m", "fed_diffusion.cli", "resume", str(path)])
    assert done.returncode == 0
    same_end(untouched, path)


def test_a_finished_run_is_not_resumed(untouched):
    with pytest.raises(ConfigError, match="nothing to resume"):
        Experiment.resume(untouched)


# --- checkpoints --------------------------------------------------------------------------------


def write_two(path):
    path.mkdir(parents=True)
    for round in (1, 2):
        save_checkpoint(path, {"theta": {"w": torch.full((3,), float(round))}}, {"round": round})


DAMAGE = {
    "a truncated tensor file": lambda p: cut(p / "checkpoint/theta.safetensors"),
    "an altered tensor file": lambda p: flip(p / "checkpoint/theta.safetensors"),
    "a missing tensor file": lambda p: (p / "checkpoint/theta.safetensors").unlink(),
    "a truncated state": lambda p: cut(p / "checkpoint/state.json"),
    "an altered state": lambda p: swap(p / "checkpoint/state.json", '"round": 2', '"round": 9'),
    "a state without a seal": lambda p: (p / "checkpoint/state.json").write_text("{}"),
    "no state": lambda p: (p / "checkpoint/state.json").unlink(),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("case", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_it_is_used(case, tmp_path, caplog):
    write_two(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run").state == {"round": 2}
    DAMAGE[case](tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.state == {"round": 1}
    assert checkpoint.tensors["theta"]["w"].tolist() == [1.0, 1.0, 1.0]
    assert "the one before it is used" in caplog.text


def test_where_both_are_damaged_it_is_said_what_is_wrong_with_each(tmp_path):
    write_two(tmp_path / "run")
    cut(tmp_path / "run/checkpoint/theta.safetensors")
    cut(tmp_path / "run/checkpoint-previous/state.json")
    with pytest.raises(CheckpointError, match=r"theta\.safetensors.*truncated.*state\.json.*damag"):
        load_checkpoint(tmp_path / "run")


def test_only_the_last_two_are_kept_and_nothing_unfinished(tmp_path):
    write_two(tmp_path / "run")
    (tmp_path / "run/.checkpoint-left").mkdir()
    save_checkpoint(tmp_path / "run", {"theta": {"w": torch.ones(1)}}, {"round": 3})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint",
        "checkpoint-previous",
    ]
    assert load_checkpoint(tmp_path / "run").state == {"round": 3}


def test_a_checkpoint_of_another_network_of_the_same_name_is_refused(tmp_path):
    experiment = Experiment(load_config("digits", SETTINGS), tmp_path / "run")
    state, tensors = experiment.coordinator.state(), experiment.coordinator.tensors()
    tensors["theta"] = {name: value[..., :1] for name, value in tensors["theta"].items()}
    with pytest.raises(ValueError, match="not those of the configured model"):
        experiment.coordinator.restore(tensors, state)


def test_a_run_that_stays_below_its_quorum_says_how_to_go_on(tmp_path):
    experiment = Experiment(load_config("digits", SETTINGS), tmp_path / "run")

    def nobody_answers(round):
        for task in experiment.tasks(round):
            experiment.reject(task.client, "no reply")

    experiment.engine = "flower"
    with pytest.raises(RunStopped, match=r"tried 3 times.*resume .*run --engine flower$"):
        experiment.train(nobody_answers)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert "fed-diffusion resume" in status["reason"]
