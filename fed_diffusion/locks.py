"""Locks that processes on several machines share through a common folder.

A lock is a file NAME.<n>.lock, and whoever made the one with the highest number holds it. It is
made with O_EXCL, which network file systems keep atomic; flock and fcntl locks vanish with their
process but are, on many of those, seen by one machine only. What a file cannot do, vanish with its
process, is made up for: a lock whose process is gone, or on another machine has not touched its
file for `STALE_S`, is taken over by making the next number, so of several that try one succeeds.
"""

from __future__ import annotations

import glob
import json
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

BEAT_S = 20.0
"""Seconds between two touches of a held lock's file."""
STALE_S = 180.0
"""Age of the last touch from which a lock is left over: network file systems show it late."""


class FileLock:
    """One lock, held by at most one process.

    Parameters
    ----------
    folder
        A folder that all who share the lock can write to.
    name
        What is locked.
    """

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._token = uuid.uuid4().hex
        self._mine: Path | None = None
        self._released = threading.Event()

    def acquire(self) -> bool:
        """Take the lock if it is free or left over; at once, without waiting."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers(), default=0)
        if number and not self._left_over(self._path(number)):
            return False
        try:
            file = os.open(self._path(number + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False  # somebody else was faster
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump(_this_process() | {"token": self._token}, stream)
        self._mine = self._path(number + 1)
        self._released.clear()
        threading.Thread(target=self._beat, args=(self._mine,), daemon=True).start()
        return True

    def held(self) -> bool:
        """Whether the lock is still ours: one that was stopped for long may have lost it."""
        if self._mine is None or self._path(max(self._numbers(), default=0)) != self._mine:
            return False
        return _read(self._mine).get("token") == self._token

    def release(self) -> None:
        """Free the lock, with what others left over before."""
        self._released.set()
        if self._mine is not None and self.held():
            for number in sorted(self._numbers()):  # ours, the highest, last
                self._path(number).unlink(missing_ok=True)
        self._mine = None

    def holder(self) -> str:
        """Who holds it, in words."""
        found = _read(self._path(max(self._numbers(), default=0)))
        return f"process {found.get('pid', '?')} on {found.get('host', 'some machine')}"

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number}.lock"

    def _numbers(self) -> list[int]:
        paths = self._folder.glob(f"{glob.escape(self._name)}.*.lock")
        ends = (re.fullmatch(r"\.(\d+)\.lock", path.name[len(self._name) :]) for path in paths)
        return [int(end[1]) for end in ends if end]

    def _left_over(self, path: Path) -> bool:
        holder, here = _read(path), _this_process()
        if all(holder.get(key) == here[key] for key in ("host", "pids")):
            return not _lives(holder["pid"], holder["started"])
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:
            return True  # released a moment ago
        return self._now() - touched > STALE_S

    def _now(self) -> float:
        """The time by the folder's own clock, which another machine's may differ from."""
        probe = self._folder / f".{self._token}"
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


def wait_for(lock: FileLock, every_s: float = 0.2) -> None:
    """Take a lock that others hold for moments only."""
    while not lock.acquire():
        time.sleep(every_s)


def _this_process() -> dict[str, Any]:
    """What tells this process from all others: a pid means something within its namespace only."""
    namespace = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pids": namespace.stat().st_ino if namespace.exists() else 0,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
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
    """What a lock's file says; nothing while it is being written, or when it is gone."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
