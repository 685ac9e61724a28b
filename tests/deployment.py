"""A real Flower deployment on loopback: a SuperLink, SuperNodes and runs, each its own process."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
MARK = "FED_DIFFUSION_TEST_DEPLOYMENT"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """Use it as a context: leaving it kills every process that came of it."""

    def __init__(self, home):
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.nodes = {}
        self.environment = os.environ | {
            MARK: str(self.home),
            "FLWR_HOME": str(self.home),
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "COLUMNS": "300",
        }
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def __enter__(self):
        self.superlink = self.spawn(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port), *self.superlink_options()),
        )
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.1)
        raise RuntimeError((self.home / "flower-superlink.log").read_text())

    def __exit__(self, *_):
        for process in self.processes():
            process.kill()

    def processes(self, word=""):
        """All that this deployment has started, with `word` in their command line; no zombies."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.home):
                    found += [process] if word in " ".join(process.cmdline()) else []
            except psutil.Error:  # it has just ended
                continue
        return found

    def spawn(self, name, *arguments, log=None):
        with (self.home / f"{log or name}.log").open("ab") as file:
            return subprocess.Popen(
                [sys.executable, SCRIPTS / name, *arguments],
                cwd=self.home,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def superlink_options(self):
        """How the SuperLink is protected: not at all."""
        return ("--insecure",)

    def node_options(self, number):
        """How a node says who it is: not at all."""
        return ("--insecure",)

    def start_node(self, partition, of, **config):
        """A SuperNode; config becomes its node config beside the partition's number."""
        pairs = {"partition-id": partition, "num-partitions": of} | config
        self.nodes[partition] = self.spawn(
            "flower-supernode",
            *self.node_options(partition),
            *("--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())),
            *("--node-config", " ".join(f"{key}={value}" for key, value in pairs.items())),
            log=f"node-{partition}",
        )

    def signal_node(self, partition, number=signal.SIGKILL):
        """The SuperNode with its ClientApp, which is a process of its own."""
        parent = psutil.Process(self.nodes[partition].pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):  # a ClientApp that has just ended
                process.send_signal(number)

    def online(self):
        """How many nodes the SuperLink holds to be there; it takes a minute to see one die."""
        listed = self.flwr("supernode", "list", "loopback", "--format", "json").stdout
        return listed.count('"online"')

    def wait_for_nodes(self, count, seconds=60):
        end = time.monotonic() + seconds
        while self.online() < count:
            if time.monotonic() > end:
                raise RuntimeError(f"{count} nodes did not come online")
            time.sleep(0.5)

    def stop_log_streams(self):
        """End `flwr run --stream`, which goes on after its ServerApp is dead."""
        for process in self.processes("--stream"):
            process.kill()

    def flwr(self, *arguments, timeout=120):
        return subprocess.run(
            [sys.executable, SCRIPTS / "flwr", *arguments],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def run(self, run_config, timeout=300, app=ROOT):
        """`flwr run` to its end; returns what it printed."""
        done = self.flwr(
            *("run", str(app), "loopback", "--stream", "--run-config", run_config), timeout=timeout
        )
        return done.stdout + done.stderr
