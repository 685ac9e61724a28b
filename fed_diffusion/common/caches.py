"""Where this program keeps what it has computed from a user's files, and how processes take turns.

The caches are in $FED_DIFFUSION_CACHE, else $XDG_CACHE_HOME/fed-diffusion, else
~/.cache/fed-diffusion; all of it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fed_diffusion.config.yaml import expanded

CACHE_VARIABLE = "FED_DIFFUSION_CACHE"


def cache_root() -> Path:
    """Return the folder of all caches; raise `ConfigError` if the home directory is unknown."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return expanded(chosen, CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base, "the cache") / "fed-diffusion"


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block; the others wait for it.

    Where the system or the file system has no such locks, nobody waits: what the block does must be
    right without them, too, and is then only done twice.
    """
    with lock.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
