"""A run directory that one process holds at a time, on whichever machine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fed_diffusion.config import ConfigError
from fed_diffusion.store.locks import STALE_S, FileLock, LockLost

LOCK = ".run"
LOCK_TOKEN = "FED_DIFFUSION_RUN_LOCK"
"""The variable by which a command lets the ServerApp that it starts hold its lock too."""


class RunTaken(ConfigError):
    """The directory holds a run that a new one would write over."""


class RunBusy(RunTaken):
    """Another process is at the run; the message says which."""


class LockedDir:
    """A directory and its lock; see `fed_diffusion.store.locks`."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self._lock: FileLock | None = None

    def lock(self) -> None:
        """Hold the directory until `unlock`; as a ServerApp beside the command that started it.

        Raises
        ------
        RunBusy
            Another process holds it; the message says which.
        ConfigError
            The directory cannot be written to.
        """
        lock = FileLock(self.path, LOCK)
        try:
            taken = lock.join(os.environ.get(LOCK_TOKEN, "")) or lock.acquire()
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written to: {error.strerror or error}."
            ) from error
        if not taken:
            raise RunBusy(
                f"{self.path} is in use by {lock.holder()}. Wait until that process has ended; the "
                "lock of one that was killed is free at once, and from another machine after "
                f"{STALE_S:.0f} s."
            )
        self._lock = lock
        # of a run that is dropped, as in a notebook, and when Python ends
        self._release = weakref.finalize(self, lock.release)

    def unlock(self) -> None:
        if self._lock is not None:
            self._release()
            self._lock = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for a while; see `lock`."""
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    @property
    def joined(self) -> bool:
        """Whether the command that started this process has claimed the directory for it."""
        return self._lock is not None and self._lock.joined

    @property
    def token(self) -> str:
        """What a process needs to know to join (`LOCK_TOKEN`); empty while this one has no lock."""
        return self._lock.token if self._lock is not None else ""

    def check_lock(self) -> None:
        """Raise `LockLost` where this process was stopped for long and another took over."""
        if self._lock is not None and not self._lock.held():
            raise LockLost(
                f"this process was stopped for long, and {self._lock.holder()} took over "
                f"{self.path}"
            )

    def in_use(self) -> bool:
        """Whether a living process holds the directory; nothing is written to find out."""
        return FileLock(self.path, LOCK).in_use()
