"""What is shown of a run while it goes on: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fed_diffusion.common.terminal import console, tell
from fed_diffusion.config import Config, ConfigError

if TYPE_CHECKING:
    from fed_diffusion.store.rundir import RunDir

LOOK_S = 0.5
"""The seconds between two looks at progress.json."""
LINE_S = 15.0
"""The seconds between two lines inside a round, or while sampling, where there is no terminal."""


class Display:
    """Shows round, loss, images/s and the time that is left: a bar, or plain lines without a
    terminal.

    Calls of the object tell it which rounds are done, and `live` tells it what goes on inside a
    round.
    """

    def __init__(self, config: Config):
        self._rounds = config.rounds
        self._said = ""
        self._next_line = time.monotonic() + LINE_S
        self._bar = Progress(
            TextColumn("{task.fields[what]}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=config.rounds, what="starting")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Show a round that is done, given its line of metrics.jsonl."""
        speed = line["images"] / max(line["seconds"], 1e-9)
        text = f"loss {line['loss']:.4f}  {speed:.0f} images/s"
        if line["rejected"]:
            text += f"  rejected {len(line['rejected'])}"
        self._said = text
        done = f"round {line['round']}/{self._rounds}"
        self._show(done, line["round"], self._rounds, text)
        if not console.is_terminal:
            tell(f"{done}  {text}")
            self._next_line = time.monotonic() + LINE_S

    def live(self, state: Mapping[str, Any]) -> None:
        """Show what progress.json says; see `fed_diffusion.store.live`."""
        done, of = state["done"], state["of"]
        left = "" if state["seconds_left"] is None else f"about {in_words(state['seconds_left'])}"
        if state["doing"] == "training":
            what = f"round {state['round']}/{state['rounds']}"
            inside = [f"{done:.0f}/{of} clients"] if of else []
            texts = [self._said, *inside, f"{left} of training left" if left else ""]
            at = state["round"] - 1 + (done / of if of else 0.0)
            total = state["rounds"]
        else:
            what, at, total = state["doing"], done, of
            texts = [f"{done:.0f}/{of} images" if of else "", f"{left} left" if left else ""]
        text = "  ".join(filter(None, texts))
        self._show(what, at, total or None, text)
        begun = of or state["doing"] != "training"  # the line of the round before comes first
        if not console.is_terminal and begun and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_S
            tell(f"{what}  {text}")

    def _show(self, what: str, at: float, total: float | None, text: str) -> None:
        self._bar.update(self._task, what=what, completed=at, total=total, description=text)


def in_words(seconds: float) -> str:
    """Return an estimated time in two digits: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


@contextmanager
def followed(run: RunDir, show: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """While the block runs, show what the run's progress.json says, whichever process writes it."""
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, show, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(run: RunDir, show: Callable[[Mapping[str, Any]], None], over: threading.Event) -> None:
    seen = None
    while not over.wait(LOOK_S):
        seen = look(run, show, seen)


def look(
    run: RunDir, show: Callable[[Mapping[str, Any]], None], seen: float | None
) -> float | None:
    """Show what progress.json says if that is new, and return when it was written."""
    try:
        state = run.doing()
        if state and state["at"] != seen:
            show(state)
            return float(state["at"])
    except (ConfigError, KeyError, TypeError, ValueError, OSError):
        return None  # damaged, or of another version: there is nothing to show
    return seen
