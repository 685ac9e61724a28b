"""Runs that are submitted from an operator's bundle: followed, left, taken up again, stopped."""

import re
import signal
import subprocess
import sys

import pytest

from fed_diffusion.cli.main import main
from fed_diffusion.generate import RunDir
from tests.deployment import Deployment
from tests.test_deployment import lines_of, status_of, wait_until
from tests.tiny import TINY


@pytest.fixture
def operator(tmp_path):
    bundle = tmp_path / "operator"
    bundle.mkdir()
    (bundle / "config.toml").write_text("")
    return bundle


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits"], "or only --resume RUN"),
        (["digits", "--out", "/a", "--resume", "/b"], "or only --resume RUN"),
        (["--out", "/a"], "or only --resume RUN"),
        (["digits", "--resume", "/a"], "or only --resume RUN"),
        (["--resume", "/a", "--set", "rounds=3"], "--set cannot be given with --resume"),
        (["--resume", "a"], "--resume a: give an absolute path"),
    ],
)
def test_a_new_run_and_a_resumed_one_are_told_apart(words, told, operator, capsys):
    assert main(["deploy", "run", str(operator), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["attach", "stop"])
@pytest.mark.parametrize("number", ["abc", "", "1 2", "/var/tmp/digits-1", "١٢", "1.0"])
def test_what_is_no_number_of_a_run_is_refused_before_flower_is_asked(
    command, number, operator, capsys
):
    assert main(["deploy", command, str(operator), number]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{number!r} is not the number of a run" in said


@pytest.mark.slow
def test_a_run_is_left_taken_up_again_stopped_and_resumed(operator, tmp_path):
    path = tmp_path / "run"
    chosen = TINY | {"clients": 2, "rounds": 5, "local.steps": 60, "evaluation.every": 0}
    with Deployment(tmp_path / "flwr") as flower:
        (operator / "config.toml").write_text(
            f'[superlink.deployment]\naddress = "127.0.0.1:{flower.port}"\ninsecure = true\n'
        )
        for partition in range(2):
            flower.start_node(partition, 2)

        def deploy(*words, stdout=subprocess.PIPE):
            command = [sys.executable, "-m", "fed_diffusion", "deploy", *map(str, words)]
            return subprocess.Popen(
                command,
                env=flower.environment,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )

        settings = [f"--set={key}={value}".replace(" ", "") for key, value in chosen.items()]
        log = tmp_path / "first.log"
        with log.open("w") as file:
            first = deploy(
                "run", operator, "digits", "--out", path, "--nodes", 2, *settings, stdout=file
            )
        wait_until(lambda: "round 1/5" in log.read_text())  # Flower sends the log in its own time
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=60)
        assert first.returncode == 130
        said = " ".join(said.split())
        number = re.search(r"run (\d+) goes on", said)[1]
        assert f"deploy attach {operator} {number}" in said
        assert f"deploy stop {operator} {number}" in said
        # it goes on indeed
        before = len(lines_of(path))
        wait_until(lambda: len(lines_of(path)) > before)
        assert deploy("stop", operator, number).wait(60) == 0
        wait_until(lambda: (path / "status.json").exists())
        assert status_of(path)["state"] == "stopped"
        assert f"deploy run OPERATOR --resume {path}" in status_of(path)["reason"]
        assert "told to end" in status_of(path)["reason"]
        attached = deploy("attach", operator, number)
        assert "finished:stopped" in attached.communicate(timeout=90)[1]
        assert attached.returncode == 1
        resumed = deploy("run", operator, "--resume", path, "--nodes", 2)
        log, said = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, log + said
        assert log.splitlines()[-1] == str(path)
        assert log.count("round 5/5") == 1
        assert RunDir(path).finished()
        assert [line["round"] for line in lines_of(path)] == [1, 2, 3, 4, 5]
        # a SuperLink that was started again without its database
        unknown = deploy("attach", operator, 12345)
        _, said = unknown.communicate(timeout=90)
        assert unknown.returncode == 1
        assert "does not know run 12345" in " ".join(said.split())
