"""run, resume and watch: what is said first and last, what is extended, what is only planned."""

import json
import math
import subprocess
import sys
import threading
import time

import pytest
import torch

import fed_diffusion as fd
from fed_diffusion.cli import progress
from fed_diffusion.cli.main import main
from fed_diffusion.engines import local
from fed_diffusion.engines.local import simulate
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY

SMALL = TINY | {"clients": 2, "rounds": 2, "local.steps": 2, "evaluation.every": 0}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 1)


def pairs(**overrides):
    settings = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    return ["--set", *(f"{key}={value}" for key, value in settings.items())]


def etas(run):
    return [json.loads(line)["eta"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_directory_is_said_first_and_last(tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["run", "digits", "--out", str(run), *pairs(rounds=1)]) == 0
    said = capfd.readouterr()
    assert said.err.splitlines()[0] == f"run directory: {run}"
    assert said.out.splitlines()[-1] == str(run)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_goes_on_with_the_step_sizes_of_the_longer_run(tmp_path, schedule):
    run = tmp_path / "run"
    settings = pairs(local__schedule=schedule, local__eta=0.01)
    assert main(["run", "digits", "--out", str(run), *settings]) == 0
    assert main(["resume", str(run), "--rounds", "4"]) == 0
    R = {1: 2, 2: 2, 3: 4, 4: 4}  # what a round's schedule is over
    cosine = [0.005 * (1 + math.cos(math.pi * (r - 1) / R[r])) for r in R]
    assert etas(run) == pytest.approx(cosine if schedule == "cosine" else [0.01] * 4)
    results = RunDir(run).results()
    assert results["rounds"] == RunDir(run).config().rounds == 4
    assert {"after_round": 2, "key": "rounds", "was": 2, "is": 4} in results["changes"]
    assert [e["round"] for e in RunDir(run).evaluations()] == [2, 4]
    assert results["evaluation"] == 2


def test_with_a_constant_step_size_a_longer_run_ends_with_the_bits_of_one_begun_so(tmp_path):
    config = fd.load_config("digits", SMALL | {"local.schedule": "constant"})
    fd.run(config, tmp_path / "extended")
    fd.resume(tmp_path / "extended", overrides={"rounds": 3})
    simulate(config.model_copy(update={"rounds": 3}), tmp_path / "whole", processes=1)
    ours, theirs = (
        RunDir(tmp_path / name).load_trained().tensors for name in ("extended", "whole")
    )
    for group in ("theta", "ema"):
        assert all(torch.equal(ours[group][n], theirs[group][n]) for n in theirs[group])


RESUMES = {
    "fewer rounds than are done": (["--rounds", "1"], "has done 2 rounds, more than rounds = 1"),
    "what decides on bits": (["--set", "local.eta=1"], "local.eta cannot be changed in a run"),
    "rounds twice": (["--rounds", "3", "--set", "rounds=4"], "rounds is given twice"),
    "only another evaluation": (["--set", "evaluation.grid=9"], "is finished"),
    "a setting that is none": (["--set", "evaluation.sample=9"], "Did you mean evaluation.samples"),
    "a value that is none": (["--set", "evaluation.samples=1", "rounds=3"], "evaluation.samples"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    simulate(fd.load_config("digits", SMALL), path, processes=1)
    return path


@pytest.mark.parametrize("case", RESUMES)
def test_a_resume_that_cannot_be_is_refused_and_writes_nothing(case, finished, capsys):
    arguments, words = RESUMES[case]
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert main(["resume", str(finished), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_a_stopped_run_takes_another_evaluation_when_it_is_resumed(tmp_path):
    run = tmp_path / "run"

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.run(fd.load_config("digits", SMALL), run, progress=stop)
    assert main(["resume", str(run), "--set", "evaluation.grid=2", "evaluation.steps=8"]) == 0
    evaluation = RunDir(run).config().evaluation
    assert (evaluation.grid, evaluation.steps) == (2, 8)


def test_watch_follows_a_run_from_another_process_to_its_end(tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = fd.load_config("digits", SMALL | {"rounds": 4})
    ready, watched = threading.Event(), {}

    def follow():
        command = [sys.executable, "-m", "fed_diffusion", "watch", str(run)]
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
        watcher = subprocess.Popen(command, text=True, **pipes)
        first = watcher.stderr.readline()
        ready.set()
        rest, error = watcher.communicate(timeout=120)
        watched.update(first=first, out=rest, err=error, code=watcher.returncode)

    thread = threading.Thread(target=follow)

    def wait(line):
        if line["round"] == 1:
            thread.start()
            assert ready.wait(120)

    fd.run(config, run, progress=wait)
    thread.join(120)
    assert watched["first"].startswith("round 1/4  loss")
    assert "round 4/4" in watched["err"]
    assert watched["out"].splitlines() == [str(run)]
    assert watched["code"] == 0


def test_watch_says_how_a_run_ended_that_did_not_finish(tmp_path, capfd):
    run = tmp_path / "run"

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.run(fd.load_config("digits", SMALL), run, progress=stop)
    assert main(["watch", str(run)]) == 1
    assert "stopped: " in capfd.readouterr().err
    (run / "status.json").unlink()  # as after a kill
    assert main(["watch", str(run)]) == 1
    assert f"fed-diffusion resume {run}" in " ".join(capfd.readouterr().err.split())


def test_a_line_without_a_terminal_says_where_in_a_round_it_is_and_what_is_left(capsys):
    shown = progress.Display(fd.load_config("digits", SMALL))
    shown._next_line = 0.0
    state = {
        "doing": "training",
        "round": 2,
        "rounds": 9,
        "done": 3,
        "of": 5,
        "seconds_left": 400.0,
    }
    shown.live(state)
    assert capsys.readouterr().err.strip() == "round 2/9  3/5 clients  about 7 min of training left"
    shown._next_line = 0.0
    shown.live(state | {"doing": "sampling", "done": 64.4, "of": 1000, "seconds_left": 40.2})
    assert capsys.readouterr().err.strip() == "sampling  64/1000 images  about 40 s left"
    shown.live(state)
    assert capsys.readouterr().err == ""  # only now and then
    assert time.monotonic() < shown._next_line


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits", "--dry-run", *pairs(pruning__level="S")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []
    config = fd.load_config("digits", SMALL | {"pruning.level": "S"})
    from fed_diffusion.build import build_network

    count = sum(p.numel() for p in build_network(config).parameters())
    for words in (f"{count:,} parameters", "level: S", "2 rounds of 2 steps", "MB for the whole"):
        assert words in said
    assert "time for sampling" in said


def test_a_dry_run_refuses_the_directory_that_the_run_would_refuse(finished, capfd):
    assert main(["run", "digits", "--out", str(finished), "--dry-run", *pairs()]) == 2
    assert "holds a run already" in " ".join(capfd.readouterr().err.split())


def test_the_other_commands_take_dry_run_too(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(finished), "--rounds", "5", "--dry-run"]) == 0
    assert "for the 3 rounds that are left" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", str(finished), "--samples", "30", "--dry-run"]) == 0
    assert "sampling: about" in capsys.readouterr().out
    sweep = tmp_path / "s.yaml"
    sweep.write_text("presets: [digits]\nmethods: [FedDM-F]\nseeds: [0, 1]\n")
    assert main(["sweep", str(sweep), "--dry-run", *pairs()]) == 0
    assert "2 runs, one after another: about" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]
    assert RunDir(finished).config().rounds == 2
