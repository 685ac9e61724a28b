"""Hosts of one's own on one machine: network namespaces on a bridge, with cables to pull.

Nothing is added to the machine's own network: the bridge is in a namespace of its own too. Needs
root and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

CABLE = Path(__file__).with_name("cable.py")
NET = "10.78.0"
SCRIPTS = Path(sysconfig.get_path("scripts"))


def why_not():
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    missing = [name for name in ("ip", "nginx") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)} (iproute2, nginx-light)" if missing else ""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Use it as a context: leaving it ends every process on the hosts, and the hosts.

    Host 0 is the server; host h has the address NET.(h + 1).
    """

    def __init__(self, count, folder):
        self._count = count
        self.folder = folder
        self._prefix = f"fd{os.getpid() % 10000}"
        self._started = []

    def _name(self, host):
        return f"{self._prefix}-{host}"

    def address(self, host):
        return f"{NET}.{host + 1}"

    def __enter__(self):
        hub = self._name("hub")
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for host in range(self._count):
            name = self._name(host)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            peer = ("type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", hub, "link", "add", f"p{host}", *peer)
            ip("-n", hub, "link", "set", f"p{host}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_):
        for process in self._started:
            self.stop(process, signal.SIGKILL)
        for host in ("hub", *range(self._count)):
            name = self._name(host)
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():  # what has left its session
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self, host):
        """Pull the host's cable at the switch."""
        ip("-n", self._name("hub"), "link", "set", f"p{host}", "down")

    def mend(self, host):
        ip("-n", self._name("hub"), "link", "set", f"p{host}", "up")

    def lengthen(self, host, mbit, ms):
        """A long thin cable in the place of the host's: `mbit` each way, `ms` one way."""
        hub, name = self._name("hub"), self._name(host)
        ip("-n", hub, "link", "del", f"p{host}")
        command = [sys.executable, CABLE, hub, f"p{host}", name, "eth0", mbit, ms]
        cable = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, start_new_session=True
        )
        self._started.append(cable)
        cable.stdout.readline()  # it is there
        ip("-n", hub, "link", "set", f"p{host}", "master", "br0", "up")
        ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")

    def start(self, host, *command, log, **environment):
        """A process on a host, its output in the file `log`; it leads a session of its own."""
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                self._command(host, command),
                env=self._environment(environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, host, *command, timeout=600, **environment):
        return subprocess.run(
            self._command(host, command),
            env=self._environment(environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def stop(self, process, number=signal.SIGTERM):
        """A signal to a process of `start` and to all that came of it."""
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number in (signal.SIGKILL, signal.SIGTERM):
            process.wait(30)

    def read(self, log):
        return (self.folder / log).read_text(errors="replace")

    def _command(self, host, command):
        return ["ip", "netns", "exec", self._name(host), *map(str, command)]

    def _environment(self, more):
        path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "COLUMNS": "300"} | more
