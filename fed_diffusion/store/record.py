"""How far a run is, and what of it is on disk: its rounds, its seconds, its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fed_diffusion.store.checkpoint import NEWEST, set_back
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.origin import Standing, note_where, resume_command
from fed_diffusion.store.rundir import RunDir


class Record:
    """Writes the lines and the checkpoints of a run.

    Parameters
    ----------
    origin
        What the run depends on; see `origin_of`.

    Attributes
    ----------
    history
        The rounds that are done.
    origin
        What the run depends on; see `fed_diffusion.store.origin`.
    saved
        The round of the newest checkpoint.
    """

    def __init__(self, run: RunDir, origin: dict[str, Any]):
        self._run = run
        self._preset = origin["config"]["preset"]
        self.history: list[RoundSummary] = []
        self.origin = origin
        self.saved = 0
        self._written = 0
        self._seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0, "total": 0.0}
        self._began = time.perf_counter()

    def go_on(self, found: Standing, state: Mapping[str, Any]) -> None:
        """Go on from where a run stands, whose checkpoint has this state."""
        then = state["origin"]
        note_where(self._run, then["made_by"], self.origin["made_by"])
        self.origin |= {"id": then["id"], "changes": found.changes}
        self.origin["data"] = self.origin["data"] or then["data"]
        self._seconds = dict(state["seconds"])
        self.history = found.rounds
        self._written = self.saved = found.round

    def line(self, summary: RoundSummary) -> None:
        """Write the line of a round; if no checkpoint follows, a resumed run drops the line
        again.
        """
        self._seconds["train"] += summary.seconds
        self.history.append(summary)
        self._run.append_metrics(summary.to_dict())
        self._written = summary.round

    def unsaved(self, round: int) -> bool:
        """Return whether the round has a line and no checkpoint."""
        return self._written > self.saved and self._written == round

    def checkpoint(
        self,
        round: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        coordinator: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint of the coordinator's tensors and state after so many rounds."""
        self._seconds["total"] = self.seconds()["total"]
        self._began = time.perf_counter()
        state = {
            "round": round,
            "preset": self._preset,
            "origin": self.origin,
            "coordinator": coordinator,
            "seconds": self._seconds,
        }
        self._run.save_checkpoint(tensors, state)
        self.saved = round

    def set_back(self, round: int) -> None:
        """Go back to the last checkpoint before a round whose theta is worth nothing.

        Lines of later rounds are dropped when the run goes on.
        """
        if self.saved == round:
            self._run.check_lock()
            self.saved = set_back(self._run.path)
        self._written = self.saved

    def seconds(self) -> dict[str, float]:
        """Return what the time was spent on, up to now."""
        total = self._seconds["total"] + time.perf_counter() - self._began
        return self._seconds | {"total": total}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time that the block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - began

    def how_to_resume(self, engine: str) -> str:
        """Return the last checkpoint and the command that goes on from it; see `resume_command`."""
        where = f"The last checkpoint is of round {self.saved}"
        where = where if self.saved else "No round was finished yet"
        return f"{where}; go on with: {resume_command(self._run.path, engine=engine)}"

    def last_good(self) -> str:
        """Return what is left of a run that diverged, and what to do."""
        if not self.history:
            return "No round was finished: start a new run with the smaller step size."
        last, best = self.history[-1], min(self.history, key=lambda summary: summary.loss)
        return (
            f"The last good checkpoint is of round {last.round}, with a loss of {last.loss:.4g} "
            f"(the lowest was {best.loss:.4g}, in round {best.round}); it is in "
            f"{self._run.path / NEWEST}. From there it would diverge again: start a new run with "
            "the smaller step size."
        )
