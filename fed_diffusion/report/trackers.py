"""What is told how a run goes, beside the run directory: a table, or trackers of the user's own."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.report.grids import grid
from fed_diffusion.store.files import append_line, write_atomic
from fed_diffusion.store.ledger import RoundSummary

KEY = "trackers"
BATCH, MOST = 50, 500
"""The settings that MLflow takes at once, and the characters of one.

MLflow's limits are 100 and at least 500.
"""
Line = Mapping[str, Any]
"""A line of metrics.jsonl, as `RoundSummary.to_dict()` makes it."""
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the setting trackers names: a class that is made with the configuration and told of the
    run.

    All calls come from the one process that writes the run directory, between the rounds. If a
    tracker raises, it is told nothing more, and a warning says so; the run goes on without it.
    """

    def begin(self, run: Path, lines: Sequence[Line], /) -> None:
        """Open what is needed, since training begins; nothing is opened before this call.

        Parameters
        ----------
        run
            The run directory.
        lines
            The lines of the rounds that are done already, where a run goes on. Rounds that the
            tracker was told of before, and that are not among these, are done again.

        Raises
        ------
        Exception
            An exception that is raised here refuses the run, before any compute.
        """

    def round(self, line: Line, /) -> None:
        """Take the line of metrics.jsonl of a round that is done."""

    def images(self, round: int, images: Tensor, /) -> None:
        """Take images generated after this round: uint8 [n, C, H, W] on the CPU."""

    def end(self, results: Mapping[str, Any] | None, /) -> None:
        """Take what results.json holds at the end of the run, or None if the run ended early.

        This method is called once for each `begin`, also when the run is interrupted.
        """


class Csv:
    """The tracker `csv` writes the numbers of each round as a row of rounds.csv in the run
    directory.
    """

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
        """Ignore images: a table has no place for them."""

    def end(self, results: Mapping[str, Any] | None) -> None:
        """Do nothing: every row is on disk already."""

    def _values(self, line: Line) -> str:
        return _row(["" if line[name] is None else line[name] for name in self.COLUMNS])


def _row(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


class TensorBoard:
    """The tracker `tensorboard` writes curves and images, for `tensorboard --logdir RUN`."""

    def __init__(self, config: Config):
        self._writer: Any = None

    def begin(self, run: Path, lines: Sequence[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # rounds that are done again replace those that were told before
        purge = lines[-1]["round"] + 1 if lines else 1
        self._writer = SummaryWriter(run / "tensorboard", purge_step=purge)

    def round(self, line: Line) -> None:
        for name, value in numbers_of(line).items():
            self._writer.add_scalar(name, value, line["round"])
        self._writer.flush()

    def images(self, round: int, images: Tensor) -> None:
        self._writer.add_images("samples", images, round)

    def end(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            for name, value in figures_of(results).items():
                self._writer.add_scalar(name, value, results["rounds"])
        self._writer.close()


class MLflow:
    """The tracker `mlflow` writes one MLflow run for each run directory, and resumes that with it.

    MLflow's setting MLFLOW_TRACKING_URI says where the run is kept; the experiment is called
    fed-diffusion unless MLFLOW_EXPERIMENT_NAME says otherwise.
    """

    ID = "mlflow-run.txt"

    def __init__(self, config: Config):
        self._settings = config.to_dict()

    def begin(self, run: Path, lines: Sequence[Line]) -> None:
        import mlflow

        known = run / self.ID
        resumed = known.read_text("utf-8").strip() if known.is_file() else None
        if resumed is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment("fed-diffusion")
        active = mlflow.start_run(run_id=resumed, run_name=None if resumed else run.name)
        if resumed is None:
            write_atomic(known, active.info.run_id + "\n")
            settings = [(key, str(value)[:MOST]) for key, value in _flat(self._settings)]
            for start in range(0, len(settings), BATCH):
                mlflow.log_params(dict(settings[start : start + BATCH]))
        self._mlflow = mlflow

    def round(self, line: Line) -> None:
        self._mlflow.log_metrics(numbers_of(line), step=line["round"])

    def images(self, round: int, images: Tensor) -> None:
        self._mlflow.log_image(grid(images), f"samples/round-{round:04d}.png")

    def end(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self._mlflow.log_metrics(figures_of(results), step=results["rounds"])
            self._mlflow.log_dict(dict(results), "results.json")
        self._mlflow.end_run("FINISHED" if results is not None else "KILLED")


def numbers_of(line: Line) -> dict[str, float]:
    """Return the columns of a round that are numbers, except the round's number."""
    found = {name: line[name] for name in Csv.COLUMNS if name != "round"}
    return {name: float(value) for name, value in found.items() if value is not None}


def figures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the quality figures of a finished run that are numbers."""
    names = ("fid", "fid_floor", "kid", "precision", "recall")
    quality = results["quality"]
    return {name: float(quality[name]) for name in names if quality[name] is not None}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


TRACKERS: dict[str, Callable[[Config], Tracker]] = {
    "csv": Csv,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}
EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Each tracker that needs another package -> that package, which is also the extra's name."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names in trackers that cannot be found, before anything else is done."""
    for name in names:
        resolve(KEY, name, TRACKERS)
        if (package := EXTRAS.get(name)) is not None and find_spec(package) is None:
            raise ConfigError(
                f"{KEY} = {name!r} needs the package {package}, which is not installed: "
                f"pip install 'fed-diffusion[{package}]'"
            )


class Trackers:
    """All trackers of a run; an error in one of them does not end the run.

    Raises
    ------
    ConfigError
    A tracker cannot be found or made.
    """

    def __init__(self, config: Config):
        self._all: dict[str, Tracker] = {}
        for name in config.trackers:
            make = resolve(KEY, name, TRACKERS)
            with blamed(KEY, name):
                self._all[name] = make(config)
        self._begun = False

    def begin(self, run: Path, lines: Sequence[Line]) -> None:
        """Call `Tracker.begin` of each tracker; an error in one is raised as a `ConfigError`."""
        self._begun = True
        for name, tracker in self._all.items():
            with blamed(KEY, name):
                tracker.begin(run, lines)

    def round(self, line: Line) -> None:
        self._tell("round", line)

    def images(self, round: int, images: Tensor) -> None:
        self._tell("images", round, images)

    def end(self, results: Mapping[str, Any] | None = None) -> None:
        """Call `end` of each tracker once for each `begin`; later calls do nothing."""
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
                logger.warning(
                    "%s The tracker is told nothing more of this run, which goes on.", error
                )
