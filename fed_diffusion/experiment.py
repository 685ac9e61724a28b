"""One run as the server sees it, whatever engine carries the messages.

Both engines drive the same object: check the configuration, hand out tasks, take updates, close
rounds; and after the last round sample, evaluate and write the report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed_diffusion.analysis.results import results_of
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.checks import VERSIONS, check
from fed_diffusion.common.compute import pinned_threads
from fed_diffusion.common.rng import Purpose
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import (
    ImageSet,
    content_hash,
    with_class_names,
)
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.generated import measure
from fed_diffusion.generate import Sampler
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.report.grids import save_grid
from fed_diffusion.report.trackers import Trackers
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from fed_diffusion.server.divergence import Diverged
from fed_diffusion.store.checkpoint import NEWEST
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.origin import (
    Standing,
    check_same_data,
    note_where,
    origin_of,
    resume_command,
    standing,
)
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.stopping import RunDiverged, RunStopped, ending

__all__ = ["Experiment", "Progress", "RunStopped"]

logger = logging.getLogger(__name__)


Progress = Callable[[dict[str, Any]], None]
"""Called with each round's line of metrics.jsonl."""


class Experiment:
    """The server's side of one run: the coordinator, the run directory and the final hook.

    An engine calls `train` with a function that carries one round's `tasks` to the clients and
    hands back what comes of each, by `receive` or `reject`.

    It holds the run directory's lock until `train` returns or raises, or until `close`.

    Parameters
    ----------
    path
        The run directory; None: a new one under runs/.
    dataset, needs_data
        See `check`.
    run
        The directory of a run to go on with, locked; see `resume`.
    """

    def __init__(
        self,
        config: Config,
        path: str | Path | None = None,
        dataset: ImageSet | None = None,
        needs_data: bool = True,
        run: RunDir | None = None,
    ):
        self.dataset = check(config, dataset, needs_data)
        self.config = config = with_class_names(config, self.dataset)
        self.trackers = Trackers(config)
        self.engine = "local"
        """What carries this run; the command that resumes it depends on it."""
        self._data = None if self.dataset is None else content_hash(self.dataset)
        self.run = RunDir.create(path, config, self._data) if run is None else run
        try:
            self.coordinator = Coordinator(config, parameters_of(build_network(config)))
            self.seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0, "total": 0.0}
            self.history: list[RoundSummary] = []
            self.origin = origin_of(config, self._data, self.run, VERSIONS)
            """What the run depends on; see `fed_diffusion.store.origin`."""
            self._written = self._saved = 0
            self._guarded = False
            self._began = self._round_began = time.perf_counter()
            if run is None:
                self._checkpoint()  # of round 0: from now on a run without one has lost it
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(
        cls,
        path: str | Path,
        dataset: ImageSet | None = None,
        needs_data: bool = True,
        accept_changes: bool = False,
    ) -> Experiment:
        """A run that was stopped or killed, at its last checkpoint (or at its start).

        Everything is checked before anything is written.

        Parameters
        ----------
        accept_changes
            See `fed_diffusion.store.origin.standing`.

        Raises
        ------
        ConfigError
            No run is there, or it is finished, or another process is at it, or it is no longer
            what it was: its settings, images, checkpoint or record have changed.
        """
        run = RunDir.open(path)
        run.lock()
        try:
            found = standing(run, VERSIONS, accept_changes)
            experiment = cls(found.config, run.path, dataset, needs_data, run)
            experiment._go_on(found)
        except BaseException:
            run.unlock()
            raise
        return experiment

    def _go_on(self, found: Standing) -> None:
        check_same_data(self.run, found.config, found.checkpoint, self._data)
        if found.checkpoint is not None:
            state = found.checkpoint.state
            try:
                self.coordinator.restore(found.checkpoint.tensors, state["coordinator"])
            except ValueError as error:
                raise ConfigError(f"{self.run.path} cannot be resumed: {error}.") from error
            then = state["origin"]
            note_where(self.run, then["made_by"], self.origin["made_by"])
            self.origin |= {"id": then["id"], "changes": found.changes}
            self.origin["data"] = self.origin["data"] or then["data"]
            self.seconds = dict(state["seconds"])
            self.history = found.rounds
            self._written = self._saved = self.coordinator.round
            self.coordinator.ledger.losses = [line.loss for line in found.rounds if line.clients]
        self.run.begin_again(found.rounds)
        if found.changed or found.checkpoint is None:
            self._checkpoint()  # from here on the run is one with the new settings

    def close(self) -> None:
        """Free the run directory for others."""
        self.trackers.end()
        self.run.unlock()

    def train(
        self, exchange: Callable[[int], None], progress: Progress | None = None
    ) -> dict[str, Any]:
        """Every round that is left, then the final hook; returns the results.

        Parameters
        ----------
        exchange
            Called with a round's number: sends `tasks(round)`, gives every reply to `receive` or
            `reject`, and returns when all are in, when there are `enough`, or at the deadline.
        progress
            Called with each round's line of metrics.

        Raises
        ------
        RunStopped
            A round stayed below its quorum, training diverged, the disk is full, ...; the message
            says how to resume, where that helps.
        """
        with self.guarded():
            self.trackers.begin(self.run.path, [summary.to_dict() for summary in self.history])
            while self.coordinator.round < self.config.rounds:
                summary = self._round(exchange)
                if progress is not None:
                    progress(summary.to_dict())
            return self.finish()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever ends a run in here: its last round is saved, status.json says why, and the
        directory is freed. The outermost of several blocks does it."""
        if self._guarded:
            yield
            return
        self._guarded = True
        try:
            with ending(self.run, self._save_last, self.how_to_resume):
                yield
        finally:
            self._guarded = False
            self.close()

    def _round(self, exchange: Callable[[int], None]) -> RoundSummary:
        """One round, tried again while it is below its quorum."""
        round = self.coordinator.round + 1
        for attempt in range(self.config.round.retries + 1):
            exchange(round)
            try:
                return self.close_round()
            except Diverged as error:  # to resume would bring it again
                raise RunDiverged(f"{error} {self._last_good()}") from error
            except BelowQuorum as error:
                problem = error
                logger.warning("%s (attempt %d)", error, attempt + 1)
        raise RunStopped(
            f"{problem} It was tried {self.config.round.retries + 1} times."
        ) from problem

    def _save_last(self) -> None:
        if self._written > self._saved and self._written == self.coordinator.round:
            self._checkpoint()

    def how_to_resume(self) -> str:
        last = self._saved
        where = f"The last checkpoint is of round {last}" if last else "No round was finished yet"
        return f"{where}; go on with: {resume_command(self.run.path, engine=self.engine)}"

    def _last_good(self) -> str:
        """What is left of a run that diverged, and what to do."""
        if not self.history:
            return "No round was finished: start a new run with it."
        last, best = self.history[-1], min(self.history, key=lambda summary: summary.loss)
        return (
            f"The last good checkpoint is of round {last.round}, with a loss of {last.loss:.4g} "
            f"(the lowest was {best.loss:.4g}, in round {best.round}); it is in "
            f"{self.run.path / NEWEST}. From there it would diverge again: start a new run with "
            "the smaller step size."
        )

    def check_keep(self, keep: float) -> None:
        """Refuse a keep ratio that a node says and that cannot be used: `ValueError`."""
        if not 0 < keep <= 1:
            raise ValueError(f"its keep = {keep:g}; it must be above 0 and at most 1")
        if self.coordinator.layout is not None:
            self.coordinator.layout.counts(keep)

    def announce(self, budgets: Mapping[int, Mapping[str, float]]) -> None:
        """Note what each client's node can carry: its keep ratio and, where measured, why."""
        for client, budget in budgets.items():
            self.coordinator.participation.announce(client, budget["keep"])
        self.run.write_budgets(self.run.budgets() | dict(budgets))

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        if self.coordinator.open is None:  # where tasks outlive rounds, a round asks repeatedly
            self._round_began = time.perf_counter()
        if self.config.privacy.clip is not None:
            self.run.note_opened(round)  # before anything of it is sent: it counts from here on
        with pinned_threads(self.config.worker.threads):
            yield from self.coordinator.tasks(round, available)

    def receive(self, update: Update, node: int | None = None) -> bool:
        with self._timed("aggregate"), pinned_threads(self.config.worker.threads):
            return self.coordinator.receive(update, node)

    def reject(self, client: int, reason: str, node: int | None = None, nbytes: int = 0) -> None:
        self.coordinator.reject(client, reason, node, nbytes)

    def enough(self) -> bool:
        return self.coordinator.enough()

    def close_round(self) -> RoundSummary:
        """Average, write the round's line and checkpoint, draw the small grid where it is due."""
        with self._timed("aggregate"), pinned_threads(self.config.worker.threads):
            summary = self.coordinator.close_round()
        summary.seconds = time.perf_counter() - self._round_began
        self.seconds["train"] += summary.seconds
        self.history.append(summary)
        # first the line, then the checkpoint: a line without one is dropped when the run resumes
        self.run.append_metrics(summary.to_dict())
        self._written = summary.round
        if summary.round % self.config.round.checkpoint_every == 0:
            self._checkpoint()
        self.trackers.round(summary.to_dict())
        every = self.config.evaluation.every
        if every and summary.round % every == 0 and summary.round < self.config.rounds:
            with self._timed("evaluate"):
                images = self._sampler().sample(16, purpose=Purpose.GRID)
                save_grid(images, self.run.path / "samples" / f"round-{summary.round:04d}.png")
            self.trackers.images(summary.round, images)
        return summary

    def _checkpoint(self) -> None:
        now = time.perf_counter()
        self.seconds["total"] += now - self._began
        self._began = now
        state = {
            "round": self.coordinator.round,
            "preset": self.config.preset,
            "origin": self.origin,
            "coordinator": self.coordinator.state(),
            "seconds": self.seconds,
        }
        self.run.save_checkpoint(self.coordinator.tensors(), state)
        self._saved = self.coordinator.round

    def finish(self) -> dict[str, Any]:
        """The post-training hook: samples, quality, results.json and the report."""
        if self._saved < self.coordinator.round:
            self._checkpoint()
        why = "the evaluation did not finish; fed-diffusion evaluate RUN does it again"
        self.run.write_results(self._results(no_quality(why, 0, 0)))
        with self._timed("evaluate"):
            quality = self._evaluate()
        results = self._results(quality)
        self.run.write_results(results)
        from fed_diffusion.report.html import write_report  # matplotlib takes seconds to import

        write_report(self.run.path)
        self.run.write_status("finished")
        self.trackers.end(results)
        return results

    def _sampler(self) -> Sampler:
        coordinator = self.coordinator
        return Sampler(
            self.config, coordinator.ema if self.config.ema.decay > 0 else coordinator.theta
        )

    def _evaluate(self) -> dict[str, Any]:
        """Sample once; the first images make the grid, all of them the figures."""
        sampler, config = self._sampler(), self.config.evaluation
        images = sampler.sample(max(config.samples, config.grid))
        save_grid(images[: config.grid], self.run.path / "samples" / "final.png")
        self.trackers.images(self.coordinator.round, images[: config.grid])
        return measure(sampler, images[: config.samples], self.dataset)

    def _results(self, quality: dict[str, Any]) -> dict[str, Any]:
        total = self.seconds["total"] + time.perf_counter() - self._began
        return results_of(
            self.config,
            self.history,
            self.coordinator.theta,
            seconds=self.seconds | {"total": total},
            quality=quality,
            opened=self.run.opened(self.coordinator.round),
            data=None if self.dataset is None else self.dataset.facts(),
            changes=self.origin["changes"],
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began
