"""progress.json says what a run is doing at this moment, to those who watch the run.

The process that owns the run directory writes it at most every `EVERY_S`, in both engines; the file
is removed when the run is over. Nothing in the run depends on it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from fed_diffusion.store.files import write_atomic
from fed_diffusion.store.rundir import RunDir

NAME = "progress.json"
EVERY_S = 0.5
RECENT = 5
"""The number of last rounds whose mean time is expected of the rounds to come."""
FEW_ANSWERS = 4
"""The number of answers below which the time between answers is not estimated."""
logger = logging.getLogger(__name__)


class Live:
    """Writes progress.json of one run."""

    def __init__(self, run: RunDir, rounds: int):
        self._run = run
        self._rounds = rounds
        self._took: list[float] = []
        self._first: float | None = None
        """The seconds of this process's first round, in which the workers start.

        They stand for other rounds only while no other round is done.
        """
        self._answers: list[float] = []
        self._round = self._done = 0
        self._doing = ""
        self._began = self._written = 0.0

    def go_on(self, seconds: Sequence[float]) -> None:
        """Take note of what the rounds took that are done already."""
        self._took = list(seconds[-RECENT:])

    def round(self, number: int) -> None:
        """Note that a round begins, or is tried again."""
        self._begin("training")
        self._round, self._done, self._answers = number, 0, []

    def answered(self, of: int) -> None:
        """Note that one of the `of` answers is in, for which a round waits."""
        self._done = min(self._done + 1, of)
        self._answers.append(time.monotonic())
        self._say(self._done, of, self._training_left(self._done / max(of, 1)))

    def closed(self, seconds: float) -> None:
        """Note that the round is closed."""
        if self._first is None:
            self._first = self._without_start(seconds)
        else:
            self._took = [*self._took, seconds][-RECENT:]
        self._round += 1
        self._done = 0
        self._began = time.monotonic()
        if self._round <= self._rounds:
            self._say(0, 0, self._training_left(0.0), now=True)

    def step(self, doing: str, done: float = 0.0, of: int = 0) -> None:
        """Note other work than training, such as "sampling": `done` of `of`, where `of` is
        known.
        """
        if doing != self._doing:
            self._begin(doing)
        elapsed = time.monotonic() - self._began
        self._say(done, of, elapsed / done * (of - done) if done else None)

    def end(self) -> None:
        """Note that the run is over, or that this process leaves the run."""
        try:
            (self._run.path / NAME).unlink(missing_ok=True)
        except OSError as error:  # as on a disk that became read-only: the run ends all the same
            logger.debug("%s cannot be removed: %s", self._run.path / NAME, error)

    def _begin(self, doing: str) -> None:
        self._doing, self._began, self._written = doing, time.monotonic(), 0.0

    def _training_left(self, part: float) -> float | None:
        """Return the seconds until the last round is closed; None while nothing is known."""
        elapsed = time.monotonic() - self._began
        if self._took:
            each = sum(self._took) / len(self._took)
        elif self._first is not None:
            each = self._first
        else:  # the first round, in which the workers start: what lies between answers tells
            return self._by_answers(part)
        # a round that takes longer than the others ends, as far as its answers tell, after this
        this = max(each - elapsed, elapsed / part - elapsed if part else 0.0, 0.0)
        return this + (self._rounds - self._round) * each

    def _by_answers(self, part: float) -> float | None:
        """Return the seconds that are left, as the answers of the first round come in."""
        count = len(self._answers)
        if count < FEW_ANSWERS or not part:
            return None
        each = (self._answers[-1] - self._answers[0]) / (count - 1) * (self._done / part)
        return each * (1 - part) + (self._rounds - self._round) * each

    def _without_start(self, seconds: float) -> float:
        """Return what a round takes, by the one in which workers started: from its first answer
        on.
        """
        count = len(self._answers)
        if count < FEW_ANSWERS:
            return seconds
        spread = self._answers[-1] - self._answers[0]
        return min(seconds, spread * count / (count - 1))

    def _say(self, done: float, of: int, left: float | None, now: bool = False) -> None:
        clock = time.monotonic()
        if not now and clock - self._written < EVERY_S and done < of:
            return
        self._written = clock
        line: dict[str, Any] = {
            "doing": self._doing,
            "round": self._round,
            "rounds": self._rounds,
            "done": round(done, 1),
            "of": of,
            "seconds_left": None if left is None else round(left, 1),
            "at": time.time(),
        }
        try:
            write_atomic(self._run.path / NAME, json.dumps(line), durable=False)
        except OSError as error:  # what the run itself writes says so loudly
            logger.debug("%s cannot be written: %s", self._run.path / NAME, error)
