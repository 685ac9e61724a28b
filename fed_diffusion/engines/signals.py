"""Signals that end a run: all of them interrupt the run, and a clean-up is not interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGHUP]

_received: list[KeyboardInterrupt] = []
"""The interrupts of this process that were raised in `stop_signals_interrupt`."""


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt too, so that the same clean-up follows.

    Python drops what is raised while it calls a destructor or the callback of a weak reference:
    see `raise_lost_interrupt`.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        _received.append(KeyboardInterrupt(*([name] if number != signal.SIGINT else [])))
        raise _received[-1]

    try:
        with _handled([signal.SIGINT, *STOP_SIGNALS], interrupt):
            yield
    finally:
        _received.clear()


def raise_lost_interrupt() -> None:
    """Raise the interrupt that this process has received, if it still goes on in spite of it."""
    if _received:
        raise _received[0]


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
