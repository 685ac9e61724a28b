"""What a user types, and what comes back."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from PIL import Image

from fed_diffusion.cli.main import main
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.generated import UNFINISHED
from fed_diffusion.evaluation.resnet56 import ResNet56
from fed_diffusion.store.rundir import RunDir
from tests.tiny import TINY


def pairs(**overrides):
    settings = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", "digits", "--out", str(path), *pairs(evaluation__samples=40)]) == 0
    return path


def test_the_run_directory_is_the_last_line(tmp_path, capfd):
    path = tmp_path / "run"
    settings = pairs(rounds=1, clients=1)
    assert main(["run", "digits", "--out", str(path), *settings]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(path)


def test_sample_writes_a_grid_that_the_seed_decides(run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(run), "--num", "4", "--out", str(out), "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 32


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--sampler", "euler"], "evaluation.sampler = 'euler'"),
        (["--guidance", "-1"], "evaluation.guidance = -1.0"),
        (["--guidance", "1"], "model.label_dropout"),
        (["--labels", "0,1"], "model.conditional"),
        (["--labels", "0;1"], "--labels = '0;1'"),
        (["--labels", "99999999999999999999"], "--labels = '99999999999999999999'"),
        (["--seed", "99999999999999999999"], "seed = 99999999999999999999"),
        (["--seed", "-1"], "seed = -1"),
    ],
)
def test_sample_refuses_what_the_network_cannot_do(run, tmp_path, capsys, arguments, key):
    out = tmp_path / "x.png"
    assert main(["sample", str(run), "--out", str(out), *arguments]) == 2
    assert key in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def test_sample_takes_another_sampler(run, tmp_path):
    for name in ("exponential_integrator", "second_order"):
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(run), "--num", "4", "--out", str(out), "--sampler", name]) == 0
    first, second = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first != second


def test_evaluate_measures_a_finished_run_again(run, capsys):
    before = json.loads((run / "results.json").read_text())["quality"]
    assert main(["evaluate", str(run)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == RunDir(run).evaluations()[-1]["quality"]
    assert again["fid"] == pytest.approx(before["fid"], rel=1e-3)


def test_evaluate_takes_other_samples_and_another_reference(run, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    assert main(["evaluate", str(again), "--samples", "30", "--reference", "test"]) == 0
    quality = json.loads(capsys.readouterr().out)
    assert quality["samples"] == 30
    assert quality["reference"].startswith("digits held out (")
    assert quality["extractor"] == "classifier(digits train, 64 features)"
    assert quality["fid"] > 0
    assert len(quality["memorisation"]["clients"]) == TINY["clients"]
    assert quality == RunDir(again).evaluations()[-1]["quality"]


def test_evaluate_leaves_the_run_s_own_figures_and_keeps_each_with_its_settings(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    own = RunDir(again).results()
    kept = RunDir(again).evaluations()
    assert kept[own["evaluation"] - 1]["quality"] == own["quality"]
    more = ["--samples", "30", "--set", "evaluation.reference=train", "evaluation.steps=8"]
    assert main(["evaluate", str(again), *more]) == 0
    assert RunDir(again).results() == own
    *before, last = RunDir(again).evaluations()
    assert before == kept
    assert (last["number"], last["round"]) == (len(kept) + 1, own["rounds"])
    changed = {"samples": 30, "reference": "train", "steps": 8}
    assert last["settings"] == kept[0]["settings"] | changed
    assert last["date"] >= kept[0]["date"]


def test_an_evaluation_that_was_cut_off_is_made_up_for_by_the_same_one_only(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    own = RunDir(again).results()
    cut = no_quality(UNFINISHED, 0, 0)
    RunDir(again).write_results(own | {"quality": cut, "evaluation": None})
    assert main(["evaluate", str(again), "--samples", "20"]) == 0
    assert RunDir(again).results()["quality"] == cut
    assert main(["evaluate", str(again)]) == 0
    results = RunDir(again).results()
    assert results["quality"] == RunDir(again).evaluations()[results["evaluation"] - 1]["quality"]
    assert results["quality"]["fid"] == pytest.approx(own["quality"]["fid"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "model.widths=[8]"], "evaluate changes only settings of evaluation.*"),
        (["--set", "evaluation.samples=9", "--samples", "8"], "samples is given twice"),
        (["--set", "evaluation.sampler=eulr"], "evaluation.sampler = 'eulr' is unknown"),
        (["--set", "evaluation.steps=2"], "evaluation.steps = 2"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_and_nothing_is_kept(run, arguments, words, capsys):
    before = RunDir(run).evaluations()
    assert main(["evaluate", str(run), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert RunDir(run).evaluations() == before


def test_evaluate_takes_several_judges_and_prints_the_figures_of_each(run, tmp_path, capsys):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    weights = tmp_path / "resnet56.pth"
    torch.save(ResNet56().state_dict(), weights)
    judges = ["--extractor", "examples.own_judge:Spectrum", "--extractor", "resnet56_cifar10"]
    command = ["evaluate", str(again), "--samples", "20", *judges]
    assert main([*command, "--weights", str(weights)]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "Name the judge that it is for" in " ".join(error.split())
    assert main([*command, "--weights", f"{{resnet56_cifar10: {weights}}}"]) == 0
    quality = json.loads(capsys.readouterr().out)
    assert quality["extractor"] == "log spectrum (examples.own_judge:Spectrum)"
    other = quality["others"]["resnet56_cifar10"]
    assert other["extractor"].startswith("resnet56_cifar10(CIFAR-10, 64 features, sha256 ")
    assert min(quality["fid"], other["fid"]) > 0
    page = (again / "report.html").read_text()
    assert "Later evaluations" in page
    assert other["extractor"] in page


REFUSED = {
    "an unknown preset": (["run", "digit"], "preset = 'digit'"),
    "an unknown key": (["run", "digits", "--set", "round=3"], "round"),
    "more clients than images": (["run", "digits", "--set", "clients=2000"], "clients"),
    "T below 1": (["run", "digits", "--set", "diffusion.T=0.9"], "diffusion.T"),
    "delta of 1": (["run", "digits", "--set", "diffusion.delta=1"], "diffusion.delta"),
    "an infinite T": (["run", "digits", "--set", "diffusion.T=.inf"], "diffusion.T"),
    "too few steps to sample": (
        ["run", "digits", "--set", "evaluation.steps=2"],
        "evaluation.steps",
    ),
    "guidance without a trained no-label": (
        ["run", "digits", "--set", "evaluation.guidance=1"],
        "evaluation.guidance",
    ),
    "a device that is none": (["run", "digits", "--set", "worker.device=gpu"], "worker.device"),
    "CUDA that is not there": (["run", "digits", "--set", "worker.device=cuda:9"], "worker.device"),
    "weights that are none": (
        ["run", "digits", "--set", "evaluation.weights=no.safetensors"],
        "evaluation.weights",
    ),
    "a setting that is given twice": (
        ["run", "digits", "--set", "rounds=1", "--set", "rounds=2"],
        "rounds is given twice",
    ),
    "a seed of 20 digits": (
        ["run", "digits", "--set", "seed=99999999999999999999"],
        "seed = '99999999999999999999' is not allowed: whole numbers are below 2^63",
    ),
    "a home that is none": (["run", "digits", "--set", "data.dir=~nobody-here/x"], "data.dir"),
    "a run that is none": (["sample", "nowhere", "--out", "x.png"], "nowhere"),
    "a network that does not fit": (
        ["run", "digits", "--set", "model.widths=[8, 8, 8, 8, 8]"],
        "model.widths",
    ),
    "a data set of ones own without a size": (
        ["run", "digits", "--set", "data.name=image_folder", "--set", "data.dir=."],
        "data.size",
    ),
    "a classifier without labels": (
        ["run", "digits", "--set", "evaluation.reference=/no/such/folder"],
        "evaluation.reference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("engine", ["local", "flower"])
def test_bad_input_is_refused_with_the_key_before_anything_is_written(
    case, engine, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments, key = REFUSED[case]
    if arguments[0] == "run":
        arguments = [*arguments, "--engine", engine]
    assert main(arguments) == 2
    assert key in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_prints_a_command_that_resumes_the_run_whatever_its_path_holds(tmp_path, capfd):
    run = tmp_path / "my :100: [red]run"

    def interrupt():
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    assert main(["run", "digits", "--out", str(run), *pairs(rounds=500, clients=1)]) == 130
    (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("interrupted"))
    words = shlex.split(line.partition("go on with: ")[2])
    assert words == ["fed-diffusion", "resume", str(run)]


def test_a_refusal_shows_a_path_as_it_was_typed(tmp_path, capsys):
    path = tmp_path / ":100: [red]x.yaml"
    path.write_text("rounds: 1\nrounds: 2\n")
    assert main(["run", str(path)]) == 2
    assert f"refused: preset {path}: rounds stands twice" in capsys.readouterr().err


BROKEN = {
    "a ServerApp that raises": (
        "        if 'FED_DIFFUSION_ENGINE' in os.environ:\n"
        "            raise RuntimeError('broken on purpose')\n",
        "        return x * self.w\n",
    ),
    "clients that all raise": (
        "",
        "        if self.training:\n"
        "            raise RuntimeError('broken on purpose')\n"
        "        return x * self.w\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_an_app_that_raises_ends_the_command_with_1_and_the_reason(case, tmp_path):
    at_start, forward = BROKEN[case]
    (tmp_path / "broken.py").write_text(
        "import os, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, model, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1))\n"
        f"{at_start}"
        "    def forward(self, x, u, labels=None):\n"
        f"{forward}"
    )
    command = ["run", "digits", "--engine", "flower", "--set", "model.name=broken:Net"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fed_diffusion.cli.main",
            *command,
            "--out",
            str(tmp_path / "my run"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "broken on purpose" in done.stderr
    if "clients" in case:  # a ServerApp that raises has no checkpoint
        resume = f"fed-diffusion resume '{tmp_path}/my run' --engine flower"
        assert f"go on with: {resume}\n" in done.stderr
    assert ours() == []


def ours():
    """Processes that belong to any engine of ours."""
    found = []
    for process in psutil.process_iter(["pid", "name"]):
        try:
            if "FED_DIFFUSION_ENGINE" in process.environ():
                found.append(process.info)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.slow
def test_ctrl_c_ends_the_run_its_superlink_and_ray(tmp_path):
    run = tmp_path / "my :100: run"
    command = ["run", "digits", "--engine", "flower", "--out", str(run), *pairs(rounds=1000)]
    program = [sys.executable, "-m", "fed_diffusion.cli", *command]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert len(ours()) > 3  # SuperLink, simulation, Ray
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"go on with: fed-diffusion resume '{run}' --engine flower\n" in said
    assert ours() == []
