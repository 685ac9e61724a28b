"""Submit a run to a SuperLink on another machine, wait for its end, or end it: `deploy run`, ...

`flwr run` stages whatever lies in the current folder, and its exit code says "submitted". `deploy
run` stages this package, and its exit code is the run's. This module imports no flwr: it starts
Flower's command.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fed_diffusion.common.text import clean
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.yaml import expanded
from fed_diffusion.engines.flower import PRESET, short_temp_dir, stage_app, to_toml
from fed_diffusion.engines.processes import bin_dirs
from fed_diffusion.engines.signals import stop_signals_interrupt
from fed_diffusion.engines.superlink import EngineError

CONNECTION = "deployment"
LOOK_S = 3.0
"""The seconds between two questions to Flower; each question costs a second of CPU here."""
LOG_LOOK_S = 20.0
"""The seconds between two questions while the log streams; the log ends with the run anyway."""
JOIN_S = 300.0
"""How many seconds to wait for nodes."""
GONE_S = 600.0
"""How many seconds a SuperLink may be away, as for a restart, before the run is given up."""
ANSWER_S = 60.0
UNKNOWN_RUN = re.compile(r"\brun\b.*\bnot found\b", re.IGNORECASE)
"""What Flower says about a run that it does not know."""


class Operator:
    """An operator's bundle: it holds the connection `deployment` for Flower's command."""

    def __init__(self, bundle: Path):
        self.bundle = expanded(bundle, "OPERATOR").absolute()
        if not (self.bundle / "config.toml").is_file():
            raise ConfigError(
                f"{self.bundle} is not an operator's bundle: it has no config.toml. Give the "
                "folder `operator` that fed-diffusion deploy init wrote."
            )
        program = shutil.which("flwr", path=os.pathsep.join(bin_dirs()))
        if program is None:
            raise ConfigError(f"flwr is not beside {sys.executable}; install fed-diffusion whole.")
        self._program = program
        self._environment = os.environ | {
            "FLWR_HOME": str(self.bundle),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "COLUMNS": "500",  # Flower's error messages in one line
        }

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run one of Flower's commands, and return its JSON answer.

        Raises
        ------
        EngineError
            The command failed; the message is Flower's.
        """
        command = [self._program, *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, timeout=ANSWER_S
            )
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"no answer from the SuperLink within {ANSWER_S:g} s") from error
        except ValueError as error:
            raise EngineError(clean(done.stdout + done.stderr)) from error
        if answer.get("success") is False:
            raise EngineError(clean(answer.get("error-message") or answer))
        return answer

    def follow(self, run_id: str) -> subprocess.Popen[bytes]:
        """Start a process that writes the run's log until the log or the process ends."""
        command = [self._program, "log", run_id, CONNECTION, "--stream"]
        return subprocess.Popen(
            command,
            env=self._environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process
        )

    def online(self) -> int:
        """Return how many nodes the SuperLink regards as online."""
        nodes = self.ask("supernode", "list", CONNECTION)["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status (running, finished:completed, ...) and what Flower says of the
        run.
        """
        (run,) = self.ask("ls", CONNECTION, "--run-id", run_id)["runs"]
        return str(run["status"]), str(run.get("status-details") or "")


def submit(operator: Operator, config: Config | None, run_dir: Path, nodes: int) -> str:
    """Submit an experiment to a deployment; returns Flower's number of the run.

    Parameters
    ----------
    config
        The settings of a new run; None goes on with the run that is in `run_dir`.
    run_dir
        The run directory, on the server.
    nodes
        How many nodes must be online before the run is submitted.

    Raises
    ------
    EngineError
        The run was not accepted, or there are too few nodes.
    """
    _wait_for_nodes(operator, nodes)
    with short_temp_dir() as home:
        stage, settings = home / "app", home / "run.toml"
        stage.mkdir()
        stage_app(stage, config or Config())
        what = {"resume": str(run_dir)} if config is None else {"run-dir": str(run_dir)}
        settings.write_text(to_toml({"preset": PRESET} | what), "utf-8")
        answer = operator.ask("run", str(stage), CONNECTION, "--run-config", str(settings))
    return str(answer["run-id"])


def attach(operator: Operator, run_id: str) -> None:
    """Show a run's log and return when the run has finished.

    Raises
    ------
    EngineError
        The run failed, or the SuperLink is gone for good or does not know the run.
    KeyboardInterrupt
        The run goes on; see `how_to_go_on`.
    """
    with stop_signals_interrupt():
        log = Log(operator, run_id)
        try:
            status, details = _wait_for_end(operator, run_id, log)
            log.wait(ANSWER_S)  # the last lines are still on their way
        finally:
            log.end()
    if status != "finished:completed":
        said = clean(details) if details else "see its log above"
        raise EngineError(f"run {run_id} is {status}: {said}")


def stop(operator: Operator, run_id: str) -> None:
    """End a run; the run writes its last checkpoint first, if there is one to write."""
    operator.ask("stop", run_id, CONNECTION)


def how_to_go_on(operator: Operator, run_id: str) -> str:
    """Return what to tell an operator who has interrupted the command that waits for a run."""
    where = shlex.join([str(operator.bundle), run_id])
    return (
        f"run {run_id} goes on. Show its log and wait for its end: fed-diffusion deploy attach "
        f"{where}; end it: fed-diffusion deploy stop {where}"
    )


class Log:
    """A run's log on this process's standard output, as far as Flower can be asked for it.

    Flower sends the whole log again to a process that asks again, as after a restart of the
    SuperLink; what was shown is not shown twice.
    """

    def __init__(self, operator: Operator, run_id: str):
        self._operator, self._run_id = operator, run_id
        self._shown = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.follow()

    def follow(self) -> None:
        """Ask for the log, unless it is coming already."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = self._operator.follow(self._run_id)
        self._reader = threading.Thread(target=self._show, args=(self._process,), daemon=True)
        self._reader.start()

    def _show(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if number >= self._shown:
                self._shown = number + 1
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()

    def wait(self, seconds: float) -> None:
        """Wait until the log ends, but no longer than this."""
        self._reader.join(seconds)

    def end(self) -> None:
        """Stop showing the log."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._reader.join(ANSWER_S)


def _wait_for_nodes(operator: Operator, wanted: int) -> None:
    end = time.monotonic() + JOIN_S
    while (there := operator.online()) < wanted:
        if time.monotonic() > end:
            raise EngineError(f"{there} of {wanted} nodes came online within {JOIN_S:g} s")
        time.sleep(LOOK_S)


def _wait_for_end(operator: Operator, run_id: str, log: Log) -> tuple[str, str]:
    """Return the run's last status; a SuperLink that is away for a while is waited for."""
    heard = time.monotonic()
    while True:
        log.wait(LOG_LOOK_S)
        try:
            status, details = operator.status(run_id)
            heard = time.monotonic()
            if status.startswith("finished"):
                return status, details
            log.follow()
        except EngineError as error:
            if UNKNOWN_RUN.search(str(error)):
                raise EngineError(
                    f"the SuperLink does not know run {run_id}: was the SuperLink started without "
                    "its database? What the run had written is in its directory, and deploy run "
                    "--resume goes on with it"
                ) from error
            if time.monotonic() - heard > GONE_S:
                raise EngineError(
                    f"the SuperLink has been away for {GONE_S:g} s: {error}"
                ) from error
            time.sleep(LOOK_S)
