"""Locks that processes on several machines share through a common folder.

A lock is a file NAME.<n>.lock; the process that made the file with the highest number holds the
lock. The file is made with O_EXCL, which network file systems keep atomic. flock and fcntl locks
would vanish with their process, but on many network file systems only one machine sees them. A file
does not vanish with its process. So if the process of a lock is gone or, on another machine, has
not touched its file for `STALE_S`, another process takes the lock over by making the file of the
next number; of several that try, one succeeds.

A process may hand its lock to one that it starts: the second one joins by the lock's token, and the
lock is left over only when both are gone.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shlex
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from fed_diffusion.store.files import write_atomic

BEAT_S = 20.0
"""The seconds between two touches of a held lock's file."""
STALE_S = 180.0
"""The seconds after its last touch when a lock is left over: network file systems show it late."""
MOST_COMMAND = 300
"""The number of characters of a holder's command line that are written down."""
logger = logging.getLogger(__name__)

_held: set[str] = set()
"""The tokens of locks that this process holds: it may outlive one that it could not remove."""


class LockLost(RuntimeError):
    """This process was stopped for so long that another process took over its work."""


class FileLock:
    """A lock that is held by at most one process, and by those that it lets join.

    Parameters
    ----------
    folder
        A folder that all who share the lock can write to.
    name
        What is locked.
    """

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self.token = uuid.uuid4().hex
        """The token that lets another process `join`."""
        self._mine: Path | None = None
        self.joined = False
        """Whether this process holds the lock beside the one that took it."""
        self._pid = 0
        self._released = threading.Event()

    def acquire(self) -> bool:
        """Take the lock if it is free or left over, without waiting."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers(), default=0)
        if number and not self._left_over(self._path(number)):
            return False
        path = self._path(number + 1)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False  # somebody else was faster
        try:
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                json.dump(_this_process() | {"token": self.token}, stream)
        except OSError:  # no space: an empty lock would keep everybody out for STALE_S
            path.unlink(missing_ok=True)
            raise
        self._hold(path)
        return True

    def join(self, token: str) -> bool:
        """Hold the lock beside the process that took it and gave this process its token."""
        path = self._path(max(self._numbers(), default=0))
        found = _read(path)
        if not token or found.get("token") != token:
            return False
        self.token, self.joined = token, True
        write_atomic(path, json.dumps(found | {"joined": _this_process()}))
        self._hold(path)
        return True

    def _hold(self, path: Path) -> None:
        self._mine, self._pid = path, os.getpid()
        self._released.clear()
        _held.add(self.token)
        threading.Thread(target=self._beat, args=(path,), daemon=True).start()

    def held(self) -> bool:
        """Return whether the lock is still ours: a process that was stopped for long may have lost
        it.
        """
        if self._mine is None or self._path(max(self._numbers(), default=0)) != self._mine:
            return False
        return _read(self._mine).get("token") == self.token

    def release(self) -> None:
        """Free the lock, and remove what others left over before; a joined lock is only left."""
        self._released.set()
        ours = self._mine is not None and self._pid == os.getpid()  # not a forked child's
        if ours and not self.joined and self.held():
            try:
                for number in sorted(self._numbers()):  # ours, the highest, last
                    self._path(number).unlink(missing_ok=True)
            except OSError as error:  # a file system that became read-only: it is left over
                logger.warning("the lock %s could not be removed: %s", self._mine, error)
        if not self.joined:
            _held.discard(self.token)
        self._mine = None

    def in_use(self) -> bool:
        """Return whether a living process holds the lock; nothing is written to find out."""
        number = max(self._numbers(), default=0)
        return bool(number) and not self._left_over(self._path(number), look_only=True)

    def holder(self) -> str:
        """Return who holds the lock, in words."""
        found = _read(self._path(max(self._numbers(), default=0)))
        words = f"process {found.get('pid', '?')} on {found.get('host', 'some machine')}"
        if "since" in found:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
            words += f" (since {began}: {found.get('command', 'an unknown command')})"
        return words

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number}.lock"

    def _numbers(self) -> list[int]:
        paths = self._folder.glob(f"{glob.escape(self._name)}.*.lock")
        ends = (re.fullmatch(r"\.(\d+)\.lock", path.name[len(self._name) :]) for path in paths)
        return [int(end[1]) for end in ends if end]

    def _left_over(self, path: Path, look_only: bool = False) -> bool:
        holder, here = _read(path), _this_process()
        if all(holder.get(key) == here[key] for key in ("host", "pids")):
            both = [one for one in (holder, holder.get("joined")) if one]
            ours = [one["pid"] == here["pid"] and holder.get("token") not in _held for one in both]
            lives = [_lives(one["pid"], one["started"]) for one in both]
            return not any(live and not mine for live, mine in zip(lives, ours, strict=True))
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:
            return True  # released a moment ago
        return (time.time() if look_only else self._now()) - touched > STALE_S

    def _now(self) -> float:
        """Return the time by the folder's own clock, which another machine's may differ from."""
        probe = self._folder / f".{self.token}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _beat(self, path: Path) -> None:
        while not self._released.wait(BEAT_S):
            try:
                os.utime(path)
            except FileNotFoundError:
                return  # lost; `held` says so
            except OSError:
                logger.debug("%s cannot be touched", path, exc_info=True)  # it may be again later


def wait_for(lock: FileLock, every_s: float = 0.2) -> None:
    """Take a lock that others hold only for moments."""
    while not lock.acquire():
        time.sleep(every_s)


def _this_process() -> dict[str, Any]:
    """Return what tells this process from all others: a pid is unique within its namespace only."""
    namespace = Path("/proc/self/ns/pid")
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pids": namespace.stat().st_ino if namespace.exists() else 0,
        "pid": os.getpid(),
        "started": process.create_time(),
        "since": time.time(),
        "command": shlex.join(process.cmdline())[:MOST_COMMAND],
    }


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        # another process may have been given the number since
        return (
            process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 10
        )
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Return what a lock's file says; nothing while the file is being written, or when it is
    gone.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
