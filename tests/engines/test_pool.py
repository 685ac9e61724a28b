"""Worker processes that are killed, that outlive their parent, or that a plain script starts."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.engines.pool import task_runner
from fed_diffusion.engines.signals import stop_signals_interrupt
from fed_diffusion.experiment import Experiment, RunStopped
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.store.checkpoint import load_checkpoint
from tests.tiny import TINY

SCRIPT = """
import os, sys
from pathlib import Path
from fed_diffusion.config import load_config
from fed_diffusion.engines.local import simulate
from tests.tiny import TINY

with open(sys.argv[1] + ".begun", "a") as file:
    file.write("once\\n")
config = load_config("digits", TINY | {"rounds": 1000, "clients": 2, "evaluation.every": 0})
simulate(config, sys.argv[1], processes=2)
"""


COMMAND = """
import sys
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess
from fed_diffusion.cli.main import main

SpawnProcess._Popen = None  # none is started like that
code = main(["run", "digits", "--out", sys.argv[1], "--set", *sys.argv[2:]])
assert not active_children()
sys.exit(code)
"""


def command(out, **given):
    """The arguments of a process that runs the command `run` with workers that are forked."""
    pairs = [f"{key}={value}" for key, value in (TINY | {"evaluation.every": 0} | given).items()]
    return [sys.executable, "-c", COMMAND, str(out), *pairs]


def children():
    """Of this process: the workers, without the helper that tracks shared resources."""
    return [child for child in psutil.Process().children(recursive=True) if is_worker(child)]


def is_worker(process):
    """Whether a process is one; of a process that has ended there is no command line any more."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_a_killed_worker_costs_time_and_no_bit(tiny, tmp_path, caplog):
    config = tiny(evaluation__every=0)
    simulate(config, tmp_path / "whole", processes=1)
    killed = []

    def kill(line):
        if not killed:
            killed.append(children()[0])
            killed[0].kill()

    simulate(config, tmp_path / "cut", processes=2, progress=kill)
    assert len(killed) == 1
    assert "a worker process ended before its task did" in caplog.text
    one, two = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert two.state["coordinator"]["strikes"] == {}
    for name, value in one.tensors["theta"].items():
        assert torch.equal(value, two.tensors["theta"][name])
    assert children() == []


def test_workers_that_cannot_live_stop_the_run_with_the_way_back(tiny, tmp_path, monkeypatch):
    config = tiny(evaluation__every=0)
    experiment = Experiment(config, tmp_path / "run")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no Python starts in here
    with pytest.raises(RunStopped, match=r"round 1: .*second time.*fed-diffusion resume"):
        run_in_process(experiment, processes=2)
    monkeypatch.undo()
    assert Experiment.resume(tmp_path / "run").coordinator.round == 0


def test_workers_of_a_plain_script_do_not_run_it_again_and_end_when_it_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(out)], env=environment)
    try:
        wait_until((out / "metrics.jsonl").exists, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run.begun").read_text() == "once\n"
    _, left = psutil.wait_procs(workers, timeout=20)
    assert left == []


@pytest.mark.skipif(usable_cores() == 1, reason="one process is none beside the command")
def test_workers_that_the_command_forks_ahead_end_with_the_bits_of_others(tiny, tmp_path):
    subprocess.run(command(tmp_path / "forked"), check=True)
    config = tiny(evaluation__every=0)
    simulate(config, tmp_path / "whole", processes=1)
    one, two = (load_checkpoint(tmp_path / name) for name in ("whole", "forked"))
    for name, value in one.tensors["theta"].items():
        assert torch.equal(value, two.tensors["theta"][name])
    # refused when they wait already: none of them is left
    refused = subprocess.run(command(tmp_path / "forked"), stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(usable_cores() == 1, reason="one process is none beside the command")
def test_workers_that_were_forked_ahead_end_when_the_command_is_killed(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(command(out, rounds=1000))
    try:
        wait_until((out / "metrics.jsonl").exists, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == min(usable_cores(), TINY["clients"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert left == []


@pytest.mark.skipif(usable_cores() == 1, reason="one process is none beside the command")
def test_workers_outlive_the_terminal_where_the_command_does(tmp_path):
    """As under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command(tmp_path / "run", rounds=1000))
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        wait_until((tmp_path / "run/metrics.jsonl").exists, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        for worker in workers:
            worker.send_signal(signal.SIGHUP)
        gone, _ = psutil.wait_procs(workers, timeout=1)
        assert gone == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path):
    process = subprocess.run(
        command(tmp_path / "run", **{"worker.device": "cuda"}), stderr=subprocess.PIPE, text=True
    )
    assert process.returncode == 2
    assert "worker.device" in process.stderr
    assert "Traceback" not in process.stderr


def wait_until(condition, process):
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, "it ended early"
        time.sleep(0.05)
    raise AssertionError("it has not come about in two minutes")


def test_a_run_that_is_interrupted_twice_ends_at_once_and_leaves_no_worker(tiny, digits):
    """Its tasks would take an hour; the second signal comes while the first one ends the pool."""
    config = tiny(local__steps=100_000, clients=4)
    coordinator = Coordinator(config, parameters_of(build_network(config)))

    def twice():
        while len(children()) < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    thread = threading.Thread(target=twice)
    thread.start()
    with stop_signals_interrupt():
        try:
            with pytest.raises(KeyboardInterrupt), task_runner(config, digits, 2) as run:
                list(run(coordinator.tasks(1)))
            thread.join()
        except KeyboardInterrupt:  # the second signal, where the pool had ended before it
            thread.join()
    assert children() == []
