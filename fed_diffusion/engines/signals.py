"""Signals that end a run: all of them interrupt the run, and a clean-up is not interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt too, so that the same clean-up follows."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(STOP_SIGNALS, interrupt):
        yield


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that would interrupt take effect after the block."""
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
