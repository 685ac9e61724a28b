"""Whether a run of Flower's goes on, and why it is over, as seen from outside its processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from fed_diffusion.engines.processes import bin_dirs, lives

QUESTION_S = 20.0
"""The seconds between questions to Flower, where there is no cheaper sign of life."""
LOG_S = 8.0
"""The seconds to wait for the last lines of the log of a run that failed."""


class Watcher:
    """A watcher looks at a run that was submitted.

    Parameters
    ----------
    home
        The run's private directory.
    environment
        The environment of the run's processes, to ask Flower with.
    process
        The SuperLink.
    client
        The process that has submitted the run, which writes its log.
    """

    def __init__(
        self,
        home: Path,
        environment: Mapping[str, str],
        process: subprocess.Popen[bytes],
        client: subprocess.Popen[bytes],
    ):
        self._home = home
        self._env = environment
        self._process = process
        self._client = client
        self._simulation: psutil.Process | None = None
        self._next_look = self._next_question = 0.0

    def why_ended(self) -> str | None:
        """Return why the run is over, as seen from outside; None while the run goes on.

        The call is cheap.
        """
        if self._process.poll() is not None:
            return f"The SuperLink ended (exit code {self._process.returncode})."
        simulation = self.simulation()
        if simulation is not None and not lives(simulation):
            return self._reason("The simulation process was killed (out of memory?).")
        if self._client.poll() is None:
            return None
        # the log's stream has ended: as a rule since the run has, so ask
        if self._client.returncode != 0 and simulation is None:
            return f"Flower did not accept the run: {_unbox(read_log(self._home, 'flwr'))}"
        if time.monotonic() < self._next_question:
            return None
        self._next_question = time.monotonic() + QUESTION_S
        return self._reason(None)

    def wait_for_log(self) -> None:
        """Let the last lines of a run that is over arrive in its log."""
        with suppress(subprocess.TimeoutExpired):
            self._client.wait(LOG_S)

    def simulation(self) -> psutil.Process | None:
        """The process that holds the ServerApp and Ray's driver, once there is one."""
        if self._simulation is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 1.0
            with suppress(psutil.Error):
                family = psutil.Process(self._process.pid).children(recursive=True)
                # the oldest: it forks, and for a moment its children look like it
                for child in sorted(family, key=lambda process: process.create_time()):
                    if any(part.endswith("flwr-simulation") for part in child.cmdline()):
                        self._simulation = child
                        break
        return self._simulation

    def _reason(self, otherwise: str | None) -> str | None:
        """Return what Flower says of a run that is over, or `otherwise`."""
        run_id = re.search(r"started run (\d+)", read_log(self._home, "flwr"))
        status, details = self._ask(run_id[1]) if run_id else ("", "")
        if status == "finished:completed":
            return "The ServerApp ended without writing status.json."
        if status.startswith("finished"):
            self.wait_for_log()
        cause = _last_exception(read_log(self._home, "flwr"))
        if status.startswith("finished"):
            return f"The run failed: {cause or details or status}"
        if otherwise is not None and cause:
            return f"{otherwise} The last error in its log: {cause}"
        return otherwise

    def _ask(self, run_id: str) -> tuple[str, str]:
        """Return status and details by `flwr ls`, which costs a second and a half of CPU."""
        program = shutil.which("flwr", path=os.pathsep.join(bin_dirs()))
        command = [str(program), "ls", "private", "--run-id", run_id, "--format", "json"]
        try:
            answer = subprocess.run(
                command, cwd=self._home / "cwd", env=self._env, capture_output=True, timeout=30
            )
            run = json.loads(answer.stdout)["runs"][0]
            return str(run["status"]), str(run.get("status-details") or "")
        except (subprocess.TimeoutExpired, ValueError, LookupError):
            return "", ""


def read_log(home: Path, name: str) -> str:
    """Return what a program of the run has written, without its colours."""
    path = home / f"{name}.log"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _last_exception(log: str) -> str:
    """Return the last line of a traceback, such as 'ModuleNotFoundError: No module named ...'."""
    found = re.findall(r"^\s*((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)$", log, re.MULTILINE)
    return found[-1] if found else ""


def _unbox(text: str) -> str:
    """Return what `flwr run` says at its end, without the box around it."""
    lines = [line.strip("│╭╰─╮╯ ") for line in text.strip().splitlines()]
    start = max(
        (i for i, line in enumerate(lines, 1) if line.startswith("Using SuperLink")), default=0
    )
    return "\n".join(line for line in lines[start:] if line and line != "Error")
