"""The memory that this process takes while it computes."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

LOOK_S = 0.002
"""The seconds between looks at the process's memory."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the highest memory since the start, above that at the start.

    On a CPU a thread looks at the process's resident memory: its own high-water mark cannot be
    reset everywhere. Free memory that the process still holds would hide what is used next, so it
    is given back first.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - idle)
        return
    _return_free_memory()
    process, done = psutil.Process(), threading.Event()
    start = highest = process.memory_info().rss

    def look() -> None:
        nonlocal highest
        while not done.wait(LOOK_S):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield lambda: float(max(highest, process.memory_info().rss) - start)
    finally:
        done.set()
        watcher.join()


def _return_free_memory() -> None:
    """Give freed memory back, which glibc keeps for the process; elsewhere do nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
