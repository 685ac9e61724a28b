"""Who is told how a run goes, beside the run directory: a table, or trackers of the user's own."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.store.files import append_line, write_atomic
from fed_diffusion.store.ledger import RoundSummary

KEY = "trackers"
Line = Mapping[str, Any]
"""A line of metrics.jsonl: `RoundSummary.to_dict()`."""
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What trackers names: a class that is made with the configuration and told how a run goes.

    All of it happens in the one process that writes the run directory, between the rounds. A
    tracker that raises is told nothing more, with a warning; the run goes on without it.
    """

    def begin(self, run: Path, lines: Sequence[Line], /) -> None:
        """Training begins. Nothing is opened before this call.

        Parameters
        ----------
        run
            The run directory.
        lines
            Those of the rounds that are done already, where a run goes on. Rounds that were told
            before and are not among them are done again.

        Raises
        ------
        Exception
            Whatever it raises here refuses the run, before any compute.
        """

    def round(self, line: Line, /) -> None:
        """A round is done: its line of metrics.jsonl."""

    def images(self, round: int, images: Tensor, /) -> None:
        """Generated images after this round: uint8 [n, C, H, W] on the CPU."""

    def end(self, results: Mapping[str, Any] | None, /) -> None:
        """The run is over: what results.json holds, or None where it ended early.

        It is called once for each `begin`, also when the run is interrupted.
        """


class Csv:
    """The tracker `csv`: the numbers of each round as a row of rounds.csv in the run directory."""

    COLUMNS = tuple(
        field.name
        for field in fields(RoundSummary)
        if not str(field.type).startswith(("list", "dict"))
    )

    def __init__(self, config: Config):
        self._path: Path | None = None

    def begin(self, run: Path, lines: Sequence[Line]) -> None:
        self._path = run / "rounds.csv"
        header = _row(self.COLUMNS)
        write_atomic(self._path, "\n".join([header, *map(self._values, lines)]) + "\n")

    def round(self, line: Line) -> None:
        assert self._path is not None
        append_line(self._path, self._values(line))

    def images(self, round: int, images: Tensor) -> None:
        """A table has no place for them."""

    def end(self, results: Mapping[str, Any] | None) -> None:
        """Every row is on disk already."""

    def _values(self, line: Line) -> str:
        return _row(["" if line[name] is None else line[name] for name in self.COLUMNS])


def _row(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


TRACKERS: dict[str, Callable[[Config], Tracker]] = {"csv": Csv}


def check_trackers(config: Config) -> None:
    """Refuse names in trackers that cannot be found, before anything else is done."""
    for name in config.trackers:
        resolve(KEY, name, TRACKERS)


class Trackers:
    """All trackers of a run, each kept from ending it.

    Raises
    ------
    ConfigError
        One of them cannot be found or made.
    """

    def __init__(self, config: Config):
        self._all: dict[str, Tracker] = {}
        for name in config.trackers:
            make = resolve(KEY, name, TRACKERS)
            with blamed(KEY, name):
                self._all[name] = make(config)
        self._begun = False

    def begin(self, run: Path, lines: Sequence[Line]) -> None:
        """See `Tracker.begin`; what goes wrong is a `ConfigError`."""
        self._begun = True
        for name, tracker in self._all.items():
            with blamed(KEY, name):
                tracker.begin(run, lines)

    def round(self, line: Line) -> None:
        self._tell("round", line)

    def images(self, round: int, images: Tensor) -> None:
        self._tell("images", round, images)

    def end(self, results: Mapping[str, Any] | None = None) -> None:
        """Once for each `begin`; later calls do nothing."""
        if self._begun:
            self._begun = False
            self._tell("end", results)

    def _tell(self, what: str, *news: Any) -> None:
        for name, tracker in list(self._all.items()):
            try:
                with blamed(KEY, name):
                    getattr(tracker, what)(*news)
            except ConfigError as error:
                del self._all[name]
                logger.warning("%s It is told nothing more of this run, which goes on.", error)
