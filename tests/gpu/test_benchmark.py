"""benchmarks/gpu.py in its reduced form: it must be ready on the day that a GPU is there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fed_diffusion.evaluation.resnet56 import ResNet56

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_FLOWER = """
import runpy, sys
sys.modules.update(flwr=None, ray=None)
sys.path.insert(0, "benchmarks")
sys.argv = sys.argv[1:]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", WITHOUT_FLOWER, "gpu.py", *map(str, words)]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=300)


def rows(out: Path, part: str) -> list[dict]:
    return json.loads((out / f"{part}.json").read_text())["rows"]


def test_check_gives_a_row_for_each_test_and_stops_when_its_time_is_over(tmp_path):
    done = run("check", "--minutes", 0.001, "--out", tmp_path)
    found = rows(tmp_path, "check")
    assert len(found) == 1, done.stdout + done.stderr
    assert found[0]["outcome"] == "passed"


def test_speed_measures_steps_sampling_and_rounds(tmp_path):
    done = run("speed", "--tiny", "--minutes", 4, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in rows(tmp_path, "speed")}
    for name in ("step, keep 1, fp32, batch 2", "step, keep 0.25, fp32, batch 2", "sampling"):
        assert found[name]["images/s"] > 0
    for name in ("a round, F", "a round, T-S", "a round, C-S"):
        assert found[name]["clients"] > 0
    failed = {name for name, row in found.items() if "why" in row}
    assert all(name.startswith("diffusers") for name in failed), failed  # where it is not installed
    assert (tmp_path / "speed.md").read_text().count("|") > 10


def test_train_killed_in_the_middle_leaves_whole_files_and_goes_on(tmp_path):
    words = ("train", "--tiny", "--device", "cpu", "--out", tmp_path / "out")
    work = ("--work", tmp_path / "work")
    process = subprocess.Popen(command(*words, *work, "--minutes", 5), cwd=ROOT)
    record = tmp_path / "out" / "train.json"
    deadline = time.monotonic() + 240
    while not record.exists() or len(rows(tmp_path / "out", "train")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {row["name"]: row for row in rows(tmp_path / "out", "train")}
    state = json.loads((tmp_path / "out" / "F" / "state.json").read_text())
    assert state["round"] >= before["F"]["rounds"] == 1
    for file in state["files"]:
        assert load_file(tmp_path / "out" / "F" / file)
    again = run(*words, *work, "--minutes", 0.01)
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "out", "train")[-1]["rounds"] > 1
    # elsewhere, with nothing but what came back
    shutil.rmtree(tmp_path / "work")
    done = int(json.loads((tmp_path / "out" / "F" / "state.json").read_text())["round"])
    torch.save(ResNet56().state_dict(), tmp_path / "resnet56.pth")
    judges = ("--judges", "classifier", "resnet56_cifar10", "--resnet56", tmp_path / "resnet56.pth")
    assert run(*words, *work, "--minutes", 0.01, *judges).returncode == 0
    last = rows(tmp_path / "out", "train")[-1]
    assert last["fid"] > last["fid_floor"] > 0
    assert last["fid resnet56_cifar10"] > last["fid_floor resnet56_cifar10"] > 0
    assert last["rounds"] == done + 1
    assert last["images"] == pytest.approx((done + 1) * before["F"]["images"])
