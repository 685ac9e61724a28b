"""Sweeps: every cell once, whatever is killed, whoever shares the work; in the end one table."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from threading import Thread

import pytest
import yaml

from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError, conf_dir, load_config, parse_pairs, presets
from fed_diffusion.config.methods import METHODS
from fed_diffusion.sweep.grid import chosen, grid, load_sweep, sweeps
from tests.tiny import TINY

METHODS_HERE, SEEDS = ["FedDM-F", "T-FedDM-S"], [0, 1]
SETTINGS = TINY | {"evaluation.every": 0, "evaluation.samples": 40}
NAMES = [f"digits-{method}-seed{seed}" for seed in SEEDS for method in METHODS_HERE]


def write(folder, **keys):
    path = folder / "mine.yaml"
    content = {"presets": ["digits"], "methods": METHODS_HERE, "seeds": SEEDS, "set": SETTINGS}
    path.write_text(yaml.safe_dump(content | keys))
    return str(path)


def command(*arguments):
    program = [sys.executable, "-m", "fed_diffusion.cli", "sweep", "--processes", "1"]
    return subprocess.Popen([*program, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def wait_until(condition, process=None):
    for _ in range(12000):
        if condition() or (process and process.poll() is not None):
            return
        time.sleep(0.01)
    raise AssertionError("it has not come about in two minutes")


def table(path):
    """A CSV without its columns of seconds."""
    rows = list(csv.DictReader(path.open()))
    assert rows
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A sweep that was left alone, with its report."""
    folder = tmp_path_factory.mktemp("whole")
    report = folder / "docs" / "tiny.md"
    arguments = ["--processes", "1", "--out", str(folder / "out"), "--report", str(report)]
    assert main(["sweep", write(folder), *arguments]) == 0
    return folder


def test_a_sweep_killed_in_the_middle_and_resumed_ends_with_the_same_figures(untouched, tmp_path):
    file, out = write(tmp_path), tmp_path / "out"
    process = command(file, "--out", out)
    third = out / "runs" / NAMES[2]
    wait_until((third / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    states = [(out / "runs" / name / "status.json").exists() for name in NAMES]
    assert states == [True, True, False, False]
    before = (out / "runs" / NAMES[0] / "results.json").read_bytes()
    assert main(["sweep", file, "--out", str(out), "--resume", "--processes", "1"]) == 0
    for name in ("table.csv", "runs.csv"):
        assert table(out / name) == table(untouched / "out" / name)
    assert (out / "runs" / NAMES[0] / "results.json").read_bytes() == before
    assert list((out / "locks").iterdir()) == []


def test_processes_that_share_a_sweep_do_every_run_exactly_once(tmp_path, capfd):
    settings = SETTINGS | {"evaluation.samples": 0, "clients": 2, "local.steps": 1}
    file, out = write(tmp_path, set=settings), tmp_path / "out"
    process = command(file, "--out", out)
    wait_until(lambda: list(out.glob("runs/*/config.yaml")), process)  # it is at the first run
    assert main(["sweep", file, "--out", str(out), "--resume", "--processes", "1"]) == 0
    printed = [process.communicate(timeout=120)[1], capfd.readouterr().err]
    assert process.returncode == 0
    begun = [re.findall(r"\] (\S+): begins", text) for text in printed]
    assert sorted(begun[0] + begun[1]) == sorted(NAMES)
    assert all(begun)
    assert "goes on" not in "".join(printed)
    assert len(table(out / "runs.csv")) == 4


def test_a_finished_sweep_is_not_done_again_but_its_tables_are(untouched, capfd):
    out = untouched / "out"
    figures = table(out / "table.csv")
    (out / "table.csv").unlink()
    assert main(["sweep", write(untouched), "--out", str(out), "--resume"]) == 0
    printed = capfd.readouterr()
    assert "begins" not in printed.err
    assert printed.out.splitlines()[-1] == str(out)
    assert "| T-FedDM-S |" in printed.out
    assert table(out / "table.csv") == figures


def test_an_existing_sweep_is_not_begun_again(untouched, capsys):
    assert main(["sweep", write(untouched), "--out", str(untouched / "out")]) == 2
    assert "--resume" in capsys.readouterr().err


def test_settings_that_changed_since_a_run_began_are_refused(untouched, capsys):
    arguments = ["--out", str(untouched / "out"), "--resume", "--set", "local.steps=4"]
    assert main(["sweep", write(untouched), *arguments]) == 2
    assert "local differ" in capsys.readouterr().err


def test_cells_of_other_images_are_not_put_beside_those_that_are_done(untouched, tmp_path, capsys):
    out = shutil.copytree(untouched / "out", tmp_path / "out")
    identity = out / "runs" / NAMES[0] / "run.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"data": "0" * 64}))
    assert main(["sweep", write(tmp_path), "--out", str(out), "--resume"]) == 2
    assert f"{identity.parent} cannot be used as it is: the images of" in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, capfd):
    file, out = write(tmp_path, set=SETTINGS | {"rounds": 500}), tmp_path / "out"
    metrics = out / "runs" / "digits-T-FedDM-S-seed0" / "metrics.jsonl"

    def interrupt():
        wait_until(metrics.exists)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt).start()
    arguments = ["--out", str(out), "--processes", "1", "--only", "T-FedDM"]
    assert main(["sweep", file, *arguments]) == 130
    printed = capfd.readouterr().err
    expected = f"fed-diffusion sweep {file} --processes 1 --out {out} --resume --only T-FedDM"
    assert f"go on with: {expected}\n" in printed
    assert list((out / "locks").iterdir()) == []
    status = json.loads((metrics.parent / "status.json").read_text())
    assert status["state"] == "stopped"


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path, capfd):
    settings = SETTINGS | {"evaluation.samples": 0}
    file, out = write(tmp_path, set=settings), tmp_path / "out"
    broken = out / "runs" / NAMES[1]
    (broken / "checkpoint").mkdir(parents=True)  # a checkpoint without its files
    overrides = settings | {"method": METHODS_HERE[1], "seed": 0}
    (broken / "config.yaml").write_text(load_config("digits", overrides).to_yaml())
    assert main(["sweep", file, "--out", str(out), "--resume", "--processes", "1"]) == 1
    printed = capfd.readouterr()
    assert f"failed: {NAMES[1]}: ConfigError:" in printed.err
    assert [row["run"] for row in table(out / "runs.csv")] == [NAMES[0], *NAMES[2:]]
    assert "3 of 4 runs" in (out / "table.md").read_text()


def test_settings_of_a_sweep_are_read_as_those_of_a_preset(tmp_path):
    (tmp_path / "2024.yaml").write_text("local: {steps: 010}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"presets: [{tmp_path}/2024.yaml]\nmethods: [FedDM-prox]\nseeds: [010, 9]\n"
        "set: {local.prox: 1e-2, flower.ray_address: 12:30, rounds: 3, data.flip: on}\n"
    )
    first, second = grid(load_sweep(str(path)), tmp_path, parse_pairs(["local.eta=1e-3"]))
    assert (first.name, second.config.seed) == ("2024-FedDM-prox-seed10", 9)
    config = first.config
    assert (config.local.prox, config.local.eta, config.local.steps) == (0.01, 0.001, 10)
    assert (config.flower.ray_address, config.rounds, config.data.flip) == ("12:30", 3, True)


REFUSED = {
    "a seed that is no number": (None, {"seeds": [True]}, "seeds.* is not allowed"),
    "a seed of 20 digits": (None, {"seeds": [10**20]}, "seeds.* is not allowed: whole numbers"),
    "a section and its key": (
        None,
        {"set": {"local": {"steps": 1}, "local.eta": 1}},
        r"local and local\.eta are given",
    ),
    "an unknown sweep": ("nothing", {}, "table2-digits"),
    "an unknown key": (None, {"seed": 3}, "seed = 3"),
    "no methods": (None, {"methods": []}, "methods"),
    "an unknown method": (None, {"methods": ["X"]}, re.escape(METHODS)),
    "an unknown preset": (None, {"presets": ["digit"]}, "Did you mean 'digits'"),
    "the same cell twice": (None, {"seeds": [1, 1]}, "digits-FedDM-F-seed1 is in it twice"),
    "a seed beside the grid's": (None, {"set": {"seed": 3}}, r"set\.seed = 3"),
    "a setting that is none": (None, {"set": {"rouns": 3}}, "Did you mean rounds"),
    "a negative seed": (None, {"seeds": [-1]}, r"seeds\.0 = -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_with_what_is_wrong(case, tmp_path):
    file, keys, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        grid(load_sweep(file or write(tmp_path, **keys)), tmp_path, {})


def test_a_bad_run_at_the_end_is_found_before_the_first_begins(tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text("model: {widths: [8, 8, 8, 8, 8]}\n")
    settings = {"evaluation.samples": 0}
    file = write(tmp_path, presets=["digits", str(tmp_path / "deep.yaml")], set=settings)
    assert main(["sweep", file, "--out", str(tmp_path / "out")]) == 2
    assert "deep-FedDM-F-seed0: model.widths" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_patterns_choose_by_a_part_of_the_name_or_by_the_whole(tmp_path):
    runs = grid(load_sweep(write(tmp_path, seeds=[1, 10])), tmp_path, {})

    def names(*patterns):
        return [run.name for run in chosen(runs, patterns)]

    assert names() == [run.name for run in runs]
    assert names("T-FedDM") == ["digits-T-FedDM-S-seed1", "digits-T-FedDM-S-seed10"]
    assert names("*seed1") == ["digits-FedDM-F-seed1", "digits-T-FedDM-S-seed1"]
    with pytest.raises(ConfigError, match=r"--only seed7 fits no run.*digits-FedDM-F-seed10"):
        names("seed7")


@pytest.mark.parametrize("name", sweeps())
def test_every_sweep_that_comes_along_is_valid(name, tmp_path):
    sweep = load_sweep(name)
    runs = grid(sweep, tmp_path, {})
    further = sum(map(len, sweep.also.values()))
    assert len(runs) == (len(sweep.presets) * len(sweep.methods) + further) * len(sweep.seeds)
    assert sweep == load_sweep(str(conf_dir() / "sweeps" / f"{name}.yaml"))


def test_the_small_table_of_fashion_mnist_compares_at_equal_images_with_one_client(tmp_path):
    runs = grid(load_sweep("table2-fashion-small"), tmp_path, {})
    methods = ["FedDM-F", "R-FedDM-S", "T-FedDM-S", "C-FedDM-S", "FedDM-F"]
    assert [run.method for run in runs] == methods
    configs = [run.config for run in runs]
    assert [config.clients for config in configs] == [10, 10, 10, 10, 1]
    assert [config.pruning.choice for config in configs[:4]] == [*["ordered"] * 3, "rolling"]
    images = {c.rounds * c.clients * c.local.steps * c.local.batch for c in configs}
    assert len(images) == 1
    assert {len(config.evaluation.extractor) for config in configs} == {2}


def test_a_sweep_is_no_preset():
    assert not set(sweeps()) & set(presets())
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("sweeps/table2-digits")
