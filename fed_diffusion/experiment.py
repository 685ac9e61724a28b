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

from fed_diffusion.build import build_network, new_network, parameters_of, with_start
from fed_diffusion.checks import VERSIONS, check
from fed_diffusion.common.compute import pinned_threads
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import (
    ImageSet,
    content_hash,
    with_class_names,
)
from fed_diffusion.finish import finish, small_grid
from fed_diffusion.protocol.errors import Fault
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.report.holdings import write_data
from fed_diffusion.report.live import LivePage
from fed_diffusion.report.trackers import Trackers
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from fed_diffusion.server.divergence import Diverged
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.live import Live
from fed_diffusion.store.origin import Standing, check_same_data, standing
from fed_diffusion.store.record import Record
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
        config = with_class_names(config, self.dataset)
        self.config = config = with_start(config) if run is None else config
        self.trackers = Trackers(config)
        self.engine = "local"
        """What carries this run; the command that resumes it depends on it."""
        self._data = None if self.dataset is None else content_hash(self.dataset)
        self.run = RunDir.create(path, config, self._data) if run is None else run
        self.live = Live(self.run, config.rounds)
        self.page = LivePage(self.run)
        try:
            goes_on = run is not None and run.has_checkpoint()
            network = (new_network if goes_on else build_network)(config)
            self.coordinator = Coordinator(config, parameters_of(network))
            self.record = Record(config, self.run, self._data, VERSIONS)
            self._guarded = False
            self._round_began = time.perf_counter()
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
        changes: Mapping[str, Any] | None = None,
    ) -> Experiment:
        """A run that was stopped or killed, at its last checkpoint (or at its start).

        Everything is checked before anything is written.

        Parameters
        ----------
        accept_changes, changes
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
            found = standing(run, VERSIONS, accept_changes, changes)
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
            self.record.go_on(found, state)
            self.live.go_on([summary.seconds for summary in found.rounds])
            self.coordinator.ledger.losses = [line.loss for line in found.rounds if line.clients]
        self.run.begin_again(found.rounds)
        self.run.note_beginning(self._data)
        if found.config != self.run.config():
            self.run.write_config(found.config)  # as it was typed with the command
        if found.changed or found.checkpoint is None:
            self._checkpoint()  # from here on the run is one with the new settings

    @property
    def history(self) -> list[RoundSummary]:
        """The rounds that are done."""
        return self.record.history

    def close(self) -> None:
        """Free the run directory for others."""
        self.trackers.end()
        self.page.end()
        self.live.end()
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
            if self.dataset is not None:
                write_data(self.run.path, self.dataset, self.config)
            self.trackers.begin(self.run.path, [summary.to_dict() for summary in self.history])
            while self.coordinator.round < self.config.rounds:
                summary = _round(self, exchange)
                if progress is not None:
                    progress(summary.to_dict())
            if self.record.saved < self.coordinator.round:
                self._checkpoint()
            return finish(self)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever ends a run in here: its last round is saved, status.json says why, and the
        directory is freed. The outermost of several blocks does it."""
        if self._guarded:
            yield
            return
        self._guarded = True
        try:
            with ending(self.run, self._save_last, lambda: self.record.how_to_resume(self.engine)):
                yield
        finally:
            self._guarded = False
            self.close()

    def announce(self, budgets: Mapping[int, Mapping[str, float]]) -> None:
        """Note what each client's node can carry: its keep ratio and, where measured, why."""
        for client, budget in budgets.items():
            self.coordinator.participation.announce(client, budget["keep"])
        self.run.write_budgets(self.run.budgets() | dict(budgets))

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        """See `Coordinator.tasks`."""
        if self.coordinator.open is None:  # where tasks outlive rounds, a round asks repeatedly
            self._round_began = time.perf_counter()
            self.live.round(round)
        if self.config.privacy.clip is not None:
            self.run.note_opened(round)  # before anything of it is sent: it counts from here on
        with pinned_threads(self.config.worker.threads):
            yield from self.coordinator.tasks(round, available)

    def receive(self, update: Update, node: int | None = None) -> bool:
        """See `Coordinator.receive`."""
        with self.record.timed("aggregate"), pinned_threads(self.config.worker.threads):
            counted = self.coordinator.receive(update, node)
        self._answered()
        return counted

    def reject(
        self,
        client: int,
        reason: str,
        node: int | None = None,
        nbytes: int = 0,
        fault: Fault = "server",
    ) -> None:
        """See `Coordinator.reject`."""
        self.coordinator.reject(client, reason, node, nbytes, fault)
        self._answered()

    def note_refused(self, nodes: list[dict[str, str]]) -> None:
        """See `Coordinator.note_refused`."""
        self.coordinator.note_refused(nodes)

    def _answered(self) -> None:
        if (state := self.coordinator.open) is not None:
            overlapping = self.coordinator.policy.overlapping
            self.live.answered(state.target if overlapping else len(state.recipes))

    def enough(self) -> bool:
        """See `Coordinator.enough`."""
        return self.coordinator.enough()

    def close_round(self) -> RoundSummary:
        """Average, write the round's line and checkpoint, draw the small grid where it is due."""
        config, record = self.config, self.record
        with record.timed("aggregate"), pinned_threads(config.worker.threads):
            summary = self.coordinator.close_round()
        summary.seconds = time.perf_counter() - self._round_began
        record.line(summary)
        if summary.round % config.round.checkpoint_every == 0:
            self._checkpoint()
        self.trackers.round(summary.to_dict())
        self.live.closed(summary.seconds)
        self.page.refresh()
        every = config.evaluation.every
        if every and summary.round % every == 0 and summary.round < config.rounds:
            small_grid(self, summary.round)
        return summary

    def _checkpoint(self) -> None:
        coordinator = self.coordinator
        self.record.checkpoint(coordinator.round, coordinator.tensors(), coordinator.state())

    def _save_last(self) -> None:
        if self.record.unsaved(self.coordinator.round):
            self._checkpoint()


def _round(experiment: Experiment, exchange: Callable[[int], None]) -> RoundSummary:
    """One round, tried again while it is below its quorum."""
    round, tries = experiment.coordinator.round + 1, experiment.config.round.retries + 1
    for attempt in range(tries):
        exchange(round)
        try:
            return experiment.close_round()
        except Diverged as error:
            if error.spoiled:
                experiment.record.set_back(round - 1)
                raise RunStopped(
                    f"{error} Or round {round - 1} has spoiled theta, by an update that counted "
                    f"in it (look at its line in metrics.jsonl; round.norm_factor and "
                    "round.aggregation withstand such): its checkpoint is put aside."
                ) from error
            # to resume would bring it again
            raise RunDiverged(f"{error} {experiment.record.last_good()}") from error
        except BelowQuorum as error:
            problem = error
            logger.warning("%s (attempt %d)", error, attempt + 1)
    raise RunStopped(f"{problem} It was tried {tries} times.") from problem
