"""Submit a run to a SuperLink on another machine and wait for its end: `deploy run`.

`flwr run` stages whatever lies in the current folder, and its exit code says "submitted"; this one
stages this package, and its exit code is the run's. Imports no flwr: it drives Flower's command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.yaml import expanded
from fed_diffusion.engines.flower import PRESET, short_temp_dir, stage_app, to_toml
from fed_diffusion.engines.processes import bin_dirs
from fed_diffusion.engines.signals import stop_signals_interrupt
from fed_diffusion.engines.superlink import EngineError

CONNECTION = "deployment"
LOOK_S = 3.0
"""Between questions to Flower; each costs a second of CPU here."""
LOG_LOOK_S = 20.0
"""The same while the run's log streams, for the log ends with the run."""
JOIN_S = 300.0
"""How long to wait for nodes."""
GONE_S = 600.0
"""How long a SuperLink may be away, as when it is restarted, before the run is given up."""
ANSWER_S = 60.0


class Operator:
    """The operator's bundle: Flower's command with the connection `deployment`."""

    def __init__(self, bundle: Path):
        self.bundle = expanded(bundle, "OPERATOR").absolute()
        if not (self.bundle / "config.toml").is_file():
            raise ConfigError(
                f"{self.bundle} is no operator's bundle: it has no config.toml. Give the folder "
                "`operator` that fed-diffusion deploy init wrote."
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
        """One of Flower's commands with a JSON answer.

        Raises
        ------
        EngineError
            It failed; the message is Flower's.
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
            raise EngineError((done.stdout + done.stderr).strip()) from error
        if answer.get("success") is False:
            raise EngineError(str(answer.get("error-message") or answer))
        return answer

    def follow(self, run_id: str) -> subprocess.Popen[bytes]:
        """The run's log on this process's own output, until either ends."""
        command = [self._program, "log", run_id, CONNECTION, "--stream"]
        return subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL)

    def online(self) -> int:
        """How many nodes the SuperLink holds to be there."""
        nodes = self.ask("supernode", "list", CONNECTION)["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    def status(self, run_id: str) -> tuple[str, str]:
        """A run's status (running, finished:completed, ...) and what Flower says of it."""
        (run,) = self.ask("ls", CONNECTION, "--run-id", run_id)["runs"]
        return str(run["status"]), str(run.get("status-details") or "")


def submit(operator: Operator, config: Config, run_dir: Path, nodes: int) -> None:
    """Run an experiment on a deployment and return when it has finished.

    Parameters
    ----------
    run_dir
        Where the ServerApp writes, on the server.
    nodes
        Wait until so many are online.

    Raises
    ------
    EngineError
        It failed, or was not accepted, or the SuperLink is gone for good.
    KeyboardInterrupt
        The run goes on; `flwr stop` ends it.
    """
    _wait_for_nodes(operator, nodes)
    with short_temp_dir() as home:
        stage, settings = home / "app", home / "run.toml"
        stage.mkdir()
        stage_app(stage, config)
        settings.write_text(to_toml({"preset": PRESET, "run-dir": str(run_dir)}), "utf-8")
        answer = operator.ask("run", str(stage), CONNECTION, "--run-config", str(settings))
    run_id = str(answer["run-id"])
    with stop_signals_interrupt():
        log = operator.follow(run_id)
        try:
            status, details = _wait_for_end(operator, run_id, log)
            log.wait(ANSWER_S)  # the last lines are still on their way
        except subprocess.TimeoutExpired:
            pass
        finally:
            log.kill()
            log.wait()
    if status != "finished:completed":
        raise EngineError(f"run {run_id} is {status}: {details or 'see its log above'}")


def _wait_for_nodes(operator: Operator, wanted: int) -> None:
    end = time.monotonic() + JOIN_S
    while (there := operator.online()) < wanted:
        if time.monotonic() > end:
            raise EngineError(f"{there} of {wanted} nodes came online within {JOIN_S:g} s")
        time.sleep(LOOK_S)


def _wait_for_end(operator: Operator, run_id: str, log: subprocess.Popen[bytes]) -> tuple[str, str]:
    """The run's last status; a SuperLink that is away for a while is waited for."""
    heard = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            log.wait(LOG_LOOK_S)
        try:
            status, details = operator.status(run_id)
            heard = time.monotonic()
            if status.startswith("finished"):
                return status, details
        except EngineError as error:
            if time.monotonic() - heard > GONE_S:
                raise EngineError(f"the SuperLink is gone for {GONE_S:g} s: {error}") from error
        if log.poll() is not None:
            time.sleep(LOOK_S)
