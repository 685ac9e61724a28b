"""A run directory has one owner at a time, and what is damaged in it is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import run_in_process, simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.store import rundir
from fed_diffusion.store.locks import LockLost
from fed_diffusion.store.rundir import LOCK_TOKEN, RunBusy, RunDir, RunTaken
from tests.tiny import TINY

CONFIG = load_config("digits", TINY | {"evaluation.every": 0, "clients": 2})

HOLD = """
import sys
from fed_diffusion.store.rundir import RunDir
run = RunDir(sys.argv[1])
run.lock()
print(run.joined, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    simulate(CONFIG, path, processes=1)
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def another_process(path, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, process.stdout.readline().strip()


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.communicate()


def test_runs_that_begin_in_the_same_second_get_directories_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunDir.create(None, CONFIG, root=tmp_path), range(16)))
    assert len({run.path for run in runs}) == 16
    assert len({run.identity()["id"] for run in runs}) == 16


def test_of_several_that_claim_the_same_directory_one_gets_it(tmp_path):
    def claim(_):
        try:
            return RunDir.create(tmp_path / "run", CONFIG)
        except RunBusy as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(claim, range(16)))
    (owner,) = [one for one in found if isinstance(one, RunDir)]
    assert all("is in use by process" in one for one in found if one is not owner)
    owner.check_lock()


def test_while_a_process_is_at_a_run_nothing_else_may_write_there_and_it_is_named(run, capsys):
    (run / "status.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in run.rglob("*")}
    process, _ = another_process(run)
    try:
        for command in (["resume"], ["resume", "--engine", "flower"], ["evaluate"]):
            assert main([command[0], str(run), *command[1:]]) == 2
            said = capsys.readouterr().err
            assert f"in use by process {process.pid} on " in said
            assert "since 20" in said
            assert str(run) in said
        assert main(["run", "digits", "--out", str(run)]) == 2
        after = {path.name: path.stat().st_mtime_ns for path in run.rglob("*.*")}
        assert all(before.get(name, time) == time for name, time in after.items())
    finally:
        end(process)
    with RunDir(run).locked():
        pass  # of a killed process the lock is free at once


def test_a_run_is_free_again_when_it_has_ended_or_was_dropped(run, tmp_path):
    experiment = Experiment(CONFIG, tmp_path / "new")
    with pytest.raises(RunBusy):
        Experiment.resume(tmp_path / "new")
    del experiment
    resumed = Experiment.resume(tmp_path / "new")
    run_in_process(resumed, processes=1)
    assert not list((tmp_path / "new").glob(".run*"))


def test_one_that_joined_leaves_the_run_to_its_owner(tmp_path, monkeypatch):
    owner = RunDir.create(tmp_path / "run", CONFIG, data="abc")
    identity = owner.identity()
    monkeypatch.setenv(LOCK_TOKEN, owner.token)
    beside = RunDir.create(tmp_path / "run", CONFIG)
    assert beside.joined
    assert beside.identity() == identity
    beside.unlock()
    owner.check_lock()
    monkeypatch.delenv(LOCK_TOKEN)
    with pytest.raises(RunBusy):
        RunDir(tmp_path / "run").lock()


def test_who_lost_the_run_writes_nothing_more(tmp_path):
    experiment = Experiment(CONFIG, tmp_path / "run")

    def taken_over(line):
        path = tmp_path / "run" / ".run.1.lock"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another's"}))

    with pytest.raises(LockLost, match="took over"):
        run_in_process(experiment, processes=1, progress=taken_over)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "run/status.json").exists()
    assert experiment.run.load_checkpoint().state["round"] == 1


@pytest.mark.parametrize("left", ["metrics.jsonl", "results.json", "checkpoint"])
def test_a_directory_where_a_run_has_left_anything_is_not_written_over(left, run):
    for path in ("metrics.jsonl", "results.json", "checkpoint", "checkpoint-previous"):
        if path != left:
            (run / path).rename(run / f"{path}.away")
    with pytest.raises(RunTaken, match="holds a run already"):
        RunDir.create(run, CONFIG)


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "report.html", "budgets.json", "samples/final.png"]
)
def test_a_users_own_file_is_not_written_over_by_a_run_s_of_the_same_name(name, tmp_path, capsys):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    assert main(["run", "digits", "--out", str(tmp_path / "mine")]) == 2
    assert f"holds {name}, which is not from a run" in capsys.readouterr().err
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [mine]
    assert mine.read_text() == "{}"


def test_a_run_that_never_began_leaves_its_directory_to_the_next_try(tmp_path):
    RunDir.create(tmp_path / "run", CONFIG).unlock()  # killed before its first checkpoint
    (tmp_path / "run/status.json").write_text('{"state": "failed"}')
    Experiment(CONFIG, tmp_path / "run").close()


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        arguments = ["--set", "rounds=1", "--out", str(tmp_path / out)]
        assert main(["run", "digits", *arguments]) == 2
        assert "cannot be made" in capsys.readouterr().err


# --- damaged files ------------------------------------------------------------------------------

DAMAGE = {
    "empty": b"",
    "cut off": b'{"state": "fin',
    "another kind of value": b"[1, 2]",
    "another encoding": "état: 1".encode("latin-1"),
    "UTF-16": '{"state": "finished"}'.encode("utf-16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.yaml", "resume"),
        ("config.yaml", "evaluate"),
        ("config.yaml", "sample"),
        ("status.json", "resume"),
        ("run.json", "resume"),
        ("results.json", "evaluate"),
    ],
)
def test_a_damaged_file_of_a_run_is_refused_by_name(name, command, damage, run, tmp_path, capsys):
    if name != "status.json":
        (run / "status.json").unlink()
    (run / name).write_bytes(DAMAGE[damage])
    options = ["--out", str(tmp_path / "x.png")] if command == "sample" else []
    assert main([command, str(run), *options]) == 2
    assert str(run / name) in capsys.readouterr().err


def test_damaged_budgets_are_refused_by_name(run):
    (run / "budgets.json").write_text('{"0": {"keep": "all"}}')
    with pytest.raises(ConfigError, match=r"budgets\.json is damaged"):
        RunDir(run).budgets()


def test_an_untrained_network_is_no_trained_run(tmp_path):
    Experiment(CONFIG, tmp_path / "run").close()
    with pytest.raises(ConfigError, match="no round is finished"):
        RunDir.open(tmp_path / "run").load_theta(ema=True)


def test_the_default_root_is_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RunDir.create(None, CONFIG).path
    assert path.parent == tmp_path / rundir.DEFAULT_ROOT
    assert path.name.startswith("digits-20")
