"""The files of a run that are read and written whole, and those that grow by a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fed_diffusion.config import ConfigError
from fed_diffusion.store.evaluations import EVALUATIONS, append_evaluation, read_evaluations
from fed_diffusion.store.files import MEND, append_line, read_object, write_atomic
from fed_diffusion.store.locked_dir import LockedDir


class RunFiles(LockedDir):
    """What a run writes down, but for its configuration and its checkpoints."""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def identity(self) -> dict[str, Any]:
        """run.json; empty where there is none, as in a run that an earlier version began."""
        return self._object("run.json")

    def _object(self, name: str) -> dict[str, Any]:
        try:
            return read_object(self.path / name)
        except FileNotFoundError:
            return {}

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.check_lock()
        append_line(self.metrics, json.dumps(line))

    def note_opened(self, round: int) -> None:
        """Bring to disk that a round is about to be sent to clients: privacy counts each time."""
        self.check_lock()
        append_line(self.path / "privacy.jsonl", json.dumps({"round": round}))

    def opened(self, finished: int) -> int:
        """How many rounds were opened, repeated ones each time; at least once all up to a last one.

        A line that cannot be read counts as well: it errs on the safe side.
        """
        path, named = self.path / "privacy.jsonl", set()
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                named.add(json.loads(line)["round"])
        return len(lines) + len(set(range(1, finished + 1)) - named)

    def write_results(self, results: Mapping[str, Any]) -> None:
        self.check_lock()
        write_atomic(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        try:
            return read_object(self.path / "results.json")
        except FileNotFoundError:
            raise ConfigError(f"{self.path} has no results.json: the run did not finish.") from None

    def append_evaluation(self, entry: Mapping[str, Any]) -> int:
        """Keep an evaluation beside those that are there; returns its number, from 1 on."""
        self.check_lock()
        return append_evaluation(self.path / EVALUATIONS, entry)

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation that was kept, in order; `ConfigError` where the file is damaged."""
        return read_evaluations(self.path / EVALUATIONS)

    def write_budgets(self, budgets: Mapping[int, Mapping[str, float]]) -> None:
        self.check_lock()
        write_atomic(self.path / "budgets.json", json.dumps(budgets, indent=2) + "\n")

    def write_status(self, state: str, reason: str | None = None) -> None:
        """The last thing a server writes: finished, or failed with the reason."""
        self.check_lock()
        write_atomic(self.path / "status.json", json.dumps({"state": state, "reason": reason}))

    def status(self) -> dict[str, Any]:
        """How the run ended, as state and reason; empty while it goes on, or after a kill."""
        return self._object("status.json")

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.status().get("state") == "finished"

    def doing(self) -> dict[str, Any]:
        """progress.json; empty where nothing is at the run."""
        return self._object("progress.json")

    def budgets(self) -> dict[int, dict[str, float]]:
        """What write_budgets wrote; empty where it wrote nothing."""
        found = self._object("budgets.json")
        try:
            return {
                int(client): {key: value for key, value in budget.items() if value == float(value)}
                for client, budget in found.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            path = self.path / "budgets.json"
            raise ConfigError(f"{path} is damaged: {error}. {MEND}") from error
