"""A private Flower SuperLink and every process that comes of it, up to Ray's workers.

All of them inherit one environment variable with a value of this run's own, and stand in its
private directory; by these they are found and ended, wherever they have re-parented.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

import psutil

MARK = "FED_DIFFUSION_ENGINE"
START_S = 120.0
"""How long the SuperLink may take to listen; about 2 s where nothing else runs."""
PATIENCE_S = 3.0
"""For a ServerApp that is interrupted: it may be in the middle of a checkpoint."""
KILL_S = 20.0
"""Ending is a matter of milliseconds, but for a process that hangs in a device driver."""
QUESTION_S = 20.0
"""Between questions to Flower, where there is no cheaper sign of life."""
LOG_S = 8.0
"""For the last lines of the log of a run that failed."""

STOP_SIGNALS = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]


class EngineError(RuntimeError):
    """The Flower engine could not run the experiment; the message says why."""


class SuperLink:
    """A SuperLink in simulation mode on a port of its own, with one run.

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
        self._port = _free_port()
        self._env = self._environment(modules) | self._ray(ray_address) | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._client: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._simulation: psutil.Process | None = None
        self._next_look = self._next_question = 0.0

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
            with _signals_held():
                self._kill()

    def start(self) -> None:
        """Start the SuperLink; `submit` waits for it."""
        if sys.platform == "win32":
            raise EngineError("The Flower engine needs Linux or macOS; on Windows, use WSL2.")
        # should this process be killed, its end of the pipe closes, and the watch cleans up
        self._watch = subprocess.Popen(
            [sys.executable, "-P", __file__, self._mark, str(self.home)],
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
        self._wait_until_listening()
        self._fill(pipe, run_config)

    def why_ended(self) -> str | None:
        """Why the run is over, as seen from outside; None while it goes on. Cheap to call."""
        assert self._process is not None
        assert self._client is not None
        if self._process.poll() is not None:
            return f"The SuperLink ended (exit code {self._process.returncode})."
        simulation = self._find_simulation()
        if simulation is not None and not _lives(simulation):
            return self._reason("The simulation process was killed (out of memory?).")
        if self._client.poll() is None:
            return None
        # the log's stream has ended: as a rule since the run has, so ask
        if self._client.returncode != 0 and simulation is None:
            return f"Flower did not accept the run: {_unbox(self._read_log('flwr'))}"
        if time.monotonic() < self._next_question:
            return None
        self._next_question = time.monotonic() + QUESTION_S
        return self._reason(None)

    def wait_for_log(self) -> None:
        """Let the last lines of a run that is over arrive in its log."""
        if self._client is not None:
            with suppress(subprocess.TimeoutExpired):
                self._client.wait(LOG_S)

    def keep_log(self, target: Path) -> Path:
        """Both logs in one file that outlives the engine."""
        parts = [("The run", "flwr"), ("The SuperLink", "flower-superlink")]
        text = "\n".join(f"--- {title} ---\n{self._read_log(name)}" for title, name in parts)
        target.write_text(text, "utf-8")
        return target

    # --- starting -------------------------------------------------------------------------------

    def _environment(self, modules: Path | None) -> dict[str, str]:
        env = dict(os.environ)
        # OMP_NUM_THREADS is left to Ray, which sets it to the CPUs of each client
        for name in ("RAY_ADDRESS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            env.pop(name, None)
        no_proxy = ",".join(filter(None, [env.get("no_proxy"), env.get("NO_PROXY"), "127.0.0.1"]))
        path = [str(modules) if modules else "", env.get("PYTHONPATH", "")]
        return env | {
            MARK: self._mark,
            "FLWR_HOME": str(self.home / "flwr"),
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

    def _ray(self, address: str | None) -> dict[str, str]:
        """For a Ray of this run's own, or one that is there, whose token our environment has."""
        if address is not None:
            return {"RAY_ADDRESS": address}
        return {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.home),
            # workers started ahead have the wrong environment for Flower's actors: never used
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            # Ray listens on every network interface, and runs what it is sent
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }

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
        tail = self._read_log("flower-superlink").strip().splitlines()[-5:]
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

    # --- watching -------------------------------------------------------------------------------

    def _find_simulation(self) -> psutil.Process | None:
        """The process that holds the ServerApp and Ray's driver, once there is one."""
        if self._simulation is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 1.0
            assert self._process is not None
            with suppress(psutil.Error):
                family = psutil.Process(self._process.pid).children(recursive=True)
                # the oldest: it forks, and for a moment its children look like it
                for child in sorted(family, key=lambda process: process.create_time()):
                    if any(part.endswith("flwr-simulation") for part in child.cmdline()):
                        self._simulation = child
                        break
        return self._simulation

    def _reason(self, otherwise: str | None) -> str | None:
        """What Flower says of a run that is over, or `otherwise`."""
        run_id = re.search(r"started run (\d+)", self._read_log("flwr"))
        status, details = self._ask(run_id[1]) if run_id else ("", "")
        if status == "finished:completed":
            return "The ServerApp ended without writing status.json."
        if status.startswith("finished"):
            self.wait_for_log()
        cause = _last_exception(self._read_log("flwr"))
        if status.startswith("finished"):
            return f"The run failed: {cause or details or status}"
        if otherwise is not None and cause:
            return f"{otherwise} The last error in its log: {cause}"
        return otherwise

    def _ask(self, run_id: str) -> tuple[str, str]:
        """Status and details by `flwr ls`, which costs a second and a half of CPU."""
        program = shutil.which("flwr", path=os.pathsep.join(bin_dirs()))
        command = [str(program), "ls", "private", "--run-id", run_id, "--format", "json"]
        try:
            answer = subprocess.run(
                command, cwd=self.home / "cwd", env=self._env, capture_output=True, timeout=30
            )
            run = json.loads(answer.stdout)["runs"][0]
            return str(run["status"]), str(run.get("status-details") or "")
        except (subprocess.TimeoutExpired, ValueError, LookupError):
            return "", ""

    def _read_log(self, name: str) -> str:
        path = self.home / f"{name}.log"
        text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    # --- ending ---------------------------------------------------------------------------------

    def _ask_to_end(self) -> None:
        """Interrupt the simulation and give it a moment."""
        simulation = self._find_simulation()
        if simulation is not None and _lives(simulation):
            with suppress(psutil.Error):
                simulation.send_signal(signal.SIGINT)
                simulation.wait(PATIENCE_S)

    def _kill(self) -> None:
        kill_run(self._mark, self.home)
        for child in (self._client, self._process, self._watch):
            if child is not None:
                child.kill()
                child.communicate()


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt too, so that the same clean-up follows."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(STOP_SIGNALS, interrupt):
        yield


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that would interrupt take effect afterwards."""
    held: list[int] = []
    with _handled([signal.SIGINT, *STOP_SIGNALS], lambda number, frame: held.append(number)):
        yield
    for number in held:
        signal.raise_signal(number)


@contextmanager
def _handled(
    numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals in the main thread (no other may); one that is ignored stays so (nohup)."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if main}
    mine = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in mine.items():
            signal.signal(number, old)


def kill_run(mark: str, home: Path) -> None:
    """Kill every process of a run."""
    deadline = time.monotonic() + KILL_S
    # again and again: one may be starting another while we look
    while (left := marked(mark, home)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


def marked(mark: str, home: Path) -> list[psutil.Process]:
    """Every process of a run; a zombie has neither environment nor directory and does not count.

    Some of Ray's write their title over their environment: those stand in `home` all the same.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(MARK) == mark or home in Path(process.cwd()).parents:
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def bin_dirs() -> list[str]:
    """Where this Python's executables are (its own link in a virtual environment: not resolved)."""
    return list(dict.fromkeys([str(Path(sys.executable).parent), sysconfig.get_path("scripts")]))


def _last_exception(log: str) -> str:
    """The last line of a traceback, such as 'ModuleNotFoundError: No module named ...'."""
    found = re.findall(r"^\s*((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)$", log, re.MULTILINE)
    return found[-1] if found else ""


def _unbox(text: str) -> str:
    """What `flwr run` says at its end, out of its box."""
    lines = [line.strip("│╭╰─╮╯ ") for line in text.strip().splitlines()]
    start = max(
        (i for i, line in enumerate(lines, 1) if line.startswith("Using SuperLink")), default=0
    )
    return "\n".join(line for line in lines[start:] if line and line != "Error")


if __name__ == "__main__":  # the watch; see `SuperLink.start`
    sys.stdin.buffer.read()
    kill_run(sys.argv[1], Path(sys.argv[2]))
    shutil.rmtree(sys.argv[2], ignore_errors=True)
