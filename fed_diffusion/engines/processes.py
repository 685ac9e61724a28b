"""The processes of a run of Flower's: how they are found and ended, wherever they have re-parented.

All of them inherit an environment variable whose value only this run has, and their working folder
is in the run's private directory. Run as a script, this file is the watch: it waits until the
process that started it is gone, and then ends the run.
"""

from __future__ import annotations

import shutil
import socket
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "FED_DIFFUSION_ENGINE"
KILL_S = 20.0
"""The seconds until an end is given up: only a process in a device driver takes longer."""


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
    """Return every process of a run; a zombie has neither environment nor directory, and is left
    out.

    Some of Ray's processes write their title over their environment; those still stand in `home`.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(MARK) == mark or home in Path(process.cwd()).parents:
                found.append(process)
    return found


def lives(process: psutil.Process) -> bool:
    """Return whether a process is there, and more than a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def bin_dirs() -> list[str]:
    """Return the folders of this Python's executables, without resolving a virtual environment's
    link.
    """
    return list(dict.fromkeys([str(Path(sys.executable).parent), sysconfig.get_path("scripts")]))


if __name__ == "__main__":  # the watch; see `SuperLink.start`
    sys.stdin.buffer.read()
    kill_run(sys.argv[1], Path(sys.argv[2]))
    shutil.rmtree(sys.argv[2], ignore_errors=True)
