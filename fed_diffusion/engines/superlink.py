"""A private Flower SuperLink and every process that comes of it, up to Ray's workers.

`processes` finds and ends them, `watching` says why a run is over, `signals` keeps the clean-up
whole.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from fed_diffusion.engines import processes
from fed_diffusion.engines.processes import MARK, bin_dirs, free_port, kill_run, lives
from fed_diffusion.engines.signals import signals_held
from fed_diffusion.engines.watching import Watcher, read_log

START_S = 120.0
"""The seconds that the SuperLink may take to listen; about 2 s where nothing else runs."""
PATIENCE_S = 3.0
"""The seconds for an interrupted ServerApp, which may be in the middle of a checkpoint."""


class EngineError(RuntimeError):
    """The Flower engine could not run the experiment; the message says why."""


class SuperLink:
    """A SuperLink in simulation mode on a separate port, with one run.

    Use it as a context: leaving it ends the SuperLink, its superexec, the simulation with the
    ServerApp, and Ray with all its workers.

    Parameters
    ----------
    home
        An empty directory with a short path. FLWR_HOME, Ray's session and the logs go there.
    modules
        A directory to import the user's own modules from, after the app's.
    environment
        Variables that every process of the run gets.
    """

    def __init__(
        self,
        home: Path,
        modules: Path | None = None,
        ray_address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.home = home
        self._mark = uuid.uuid4().hex
        self._port = free_port()
        own = _environment(home, self._mark, modules) | _ray(home, ray_address)
        self._env = own | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._client: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # a run that has ended has nothing left to save; one that is interrupted may have
            if kind is not None and not issubclass(kind, EngineError):
                self._ask_to_end()
        finally:  # also after a second Ctrl-C, which means: do not wait
            with signals_held():
                self._kill()

    def start(self) -> None:
        """Start the SuperLink; `submit` waits for it."""
        if sys.platform == "win32":
            raise EngineError("The Flower engine needs Linux or macOS; on Windows, use WSL2.")
        # should this process be killed, its end of the pipe closes, and the watch cleans up
        self._watch = subprocess.Popen(
            [sys.executable, "-P", processes.__file__, self._mark, str(self.home)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        config = f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        (self.home / "flwr").mkdir()
        (self.home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "private"\n\n[superlink.private]\n{config}', "utf-8"
        )
        # an empty directory: the ServerApp and Ray's workers stand in it, and import from it first
        (self.home / "cwd").mkdir()
        options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = self._spawn("flower-superlink", *options)

    def submit(self, app_dir: Path, run_config: str, federation: str) -> None:
        """Submit the app, with run_config as TOML and federation as `key=value` pairs.

        The process that does it stays, and writes the run's log.
        """
        # `flwr run` spends a second on imports: it does so while the SuperLink starts, and then
        # waits for its run-config, a pipe that is filled once the SuperLink listens
        pipe = self.home / "run.toml"
        os.mkfifo(pipe)
        command = ["run", str(app_dir), "private", "--stream"]
        options = ["--run-config", str(pipe), "--federation-config", federation]
        self._client = self._spawn("flwr", *command, *options)
        assert self._process is not None
        self._watcher = Watcher(self.home, self._env, self._process, self._client)
        self._wait_until_listening()
        self._fill(pipe, run_config)

    def why_ended(self) -> str | None:
        """Return why the run is over; see `Watcher.why_ended`."""
        assert self._watcher is not None
        return self._watcher.why_ended()

    def wait_for_log(self) -> None:
        """Wait for the last lines of the log; see `Watcher.wait_for_log`."""
        if self._watcher is not None:
            self._watcher.wait_for_log()

    def keep_log(self, target: Path) -> Path:
        """Write both logs into one file that outlives the engine."""
        parts = [("The run", "flwr"), ("The SuperLink", "flower-superlink")]
        text = "\n".join(f"--- {title} ---\n{read_log(self.home, name)}" for title, name in parts)
        target.write_text(text, "utf-8")
        return target

    # --- starting -------------------------------------------------------------------------------

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        program = shutil.which(name, path=os.pathsep.join(bin_dirs()))
        if program is None:
            raise EngineError(f"{name} is not beside {sys.executable}; install flwr[simulation].")
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [program, *arguments],
                cwd=self.home / "cwd",
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for us; we end the others in order
            )

    def _wait_until_listening(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            # by its socket, not by an answer on the port: that might be another program's
            with suppress(psutil.Error):
                sockets = psutil.Process(self._process.pid).net_connections("tcp")
                if any(s.status == psutil.CONN_LISTEN for s in sockets):
                    return
            time.sleep(0.05)
        tail = read_log(self.home, "flower-superlink").strip().splitlines()[-5:]
        how = f"The SuperLink did not start (exit code {self._process.poll()})."
        raise EngineError("\n".join([how, *tail]))

    def _fill(self, pipe: Path, text: str) -> None:
        assert self._client is not None
        while self._client.poll() is None:
            try:
                descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # not opened for reading yet
                time.sleep(0.05)
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            return

    # --- ending ---------------------------------------------------------------------------------

    def _ask_to_end(self) -> None:
        """Interrupt the simulation and give it a moment."""
        simulation = None if self._watcher is None else self._watcher.simulation()
        if simulation is not None and lives(simulation):
            with suppress(psutil.Error):
                simulation.send_signal(signal.SIGINT)
                simulation.wait(PATIENCE_S)

    def _kill(self) -> None:
        kill_run(self._mark, self.home)
        for child in (self._client, self._process, self._watch):
            if child is not None:
                child.kill()
                child.communicate()


def _environment(home: Path, mark: str, modules: Path | None) -> dict[str, str]:
    """Return the environment of every process of a run."""
    env = dict(os.environ)
    # OMP_NUM_THREADS is left to Ray, which sets it to the CPUs of each client
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env.pop(name, None)
    no_proxy = ",".join(filter(None, [env.get("no_proxy"), env.get("NO_PROXY"), "127.0.0.1"]))
    path = [str(modules) if modules else "", env.get("PYTHONPATH", "")]
    return env | {
        MARK: mark,
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # else the app's dependencies are installed anew into each run
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # the superexec polls for tasks all through the run; ours is there at its first poll
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "2",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PATH": os.pathsep.join([*bin_dirs(), env.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "500",  # Flower's error messages in one line
    }


def _ray(home: Path, address: str | None) -> dict[str, str]:
    """Return settings for a Ray of this run, or for one that exists, whose token is in our
    environment.
    """
    if address is not None:
        return {"RAY_ADDRESS": address}
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        # workers started ahead have the wrong environment for Flower's actors: never used
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Ray listens on every network interface, and runs what it is sent
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
