"""One run as the server sees it, whatever engine carries the messages.

Both engines drive the same object: check the configuration, hand out tasks, take updates, close
rounds; and after the last round sample, evaluate and write the report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fed_diffusion.build import Setup, with_class_names, with_start
from fed_diffusion.checks import VERSIONS, check, data_hash
from fed_diffusion.common.compute import pinned_threads
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import ImageSet
from fed_diffusion.finish import finish, small_grid
from fed_diffusion.protocol.errors import Fault
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.report.holdings import write_clients, write_real
from fed_diffusion.report.live import LivePage
from fed_diffusion.report.trackers import Trackers
from fed_diffusion.server.coordinator import BelowQuorum
from fed_diffusion.server.divergence import Diverged
from fed_diffusion.server.secure import SecureCoordinator, coordinator_of
from fed_diffusion.store.ledger import RoundSummary
from fed_diffusion.store.live import Live
from fed_diffusion.store.origin import Standing, check_same_data, origin_of, standing
from fed_diffusion.store.record import Record
from fed_diffusion.store.rundir import RunDir
from fed_diffusion.store.stopping import RunDiverged, RunStopped, ending

__all__ = ["Experiment", "Progress", "RunStopped"]

logger = logging.getLogger(__name__)


Progress = Callable[[dict[str, Any]], None]
"""A function that is called with each round's line of metrics.jsonl."""


class Experiment:
    """The server's side of one run: the coordinator, the run directory and the final hook.

    An engine calls `train` with a function that carries one round's `tasks` to the clients and
    hands each outcome back, by `receive` or `reject`. The experiment holds the run directory's lock
    until `train` returns or raises, or until `close`.

    Parameters
    ----------
    path
        The run directory; None stands for a new one under runs/.
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
        setup = Setup.of(config)
        self.dataset = check(setup, dataset, needs_data)
        named = with_class_names(config, self.dataset)
        self.config = named = with_start(named) if run is None else named
        self.setup = setup = setup if named is config else Setup.of(named)
        self.trackers = Trackers(named)
        self.engine = "local"  # it stands in the command that resumes the run
        self._data = data_hash(named, self.dataset)
        self.run = RunDir.create(path, named, self._data) if run is None else run
        self.live = Live(self.run, config.rounds)
        self.page = LivePage(self.run)
        try:
            started = run is None or not run.has_checkpoint()
            self.coordinator = coordinator_of(setup, setup.theta(started))
            self.record = _record(self)
            self._guarded = False
            self._round_began = time.perf_counter()
            if run is None:
                _checkpoint(self)  # of round 0: from now on a run without one has lost it
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
        """Return a run that was stopped or killed, at its last checkpoint (or at its start).

        Everything is checked before anything is written.

        Parameters
        ----------
        accept_changes, changes
            See `fed_diffusion.store.origin.standing`.

        Raises
        ------
        ConfigError
            There is no run, it is finished, another process works on it, or it has changed:
            its settings, images, checkpoint or record.
        """
        run = RunDir.open(path)
        run.lock()
        try:
            found = standing(run, VERSIONS, accept_changes, changes)
            experiment = cls(found.config, run.path, dataset, needs_data, run)
            _go_on(experiment, found)
        except BaseException:
            run.unlock()
            raise
        return experiment

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
        """Train every round that is left, then run the final hook; return the results.

        Parameters
        ----------
        exchange
            A function that is called with a round's number. It sends `tasks(round)`, gives every
            reply to `receive` or `reject`, and returns when all replies are in, when there are
            `enough`, or at the deadline.
        progress
            A function that is called with each round's line of metrics.

        Raises
        ------
        RunStopped
            A round stayed below its quorum, training diverged, ...; the message says how to resume.
        """
        with self.guarded():
            write_data(self.run.path, self.dataset, self.setup)
            self.trackers.begin(self.run.path, [summary.to_dict() for summary in self.history])
            while self.coordinator.round < self.config.rounds:
                summary = _round(self, exchange)
                if progress is not None:
                    progress(summary.to_dict())
            if self.record.saved < self.coordinator.round:
                _checkpoint(self)
            return finish(self)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Guard a block that may end a run: save the last round, write status.json, unlock.
        Of several blocks inside one another, the outermost does this.
        """
        if self._guarded:
            yield
            return
        self._guarded = True
        try:
            save, how = partial(_save_last, self), lambda: self.record.how_to_resume(self.engine)
            with ending(self.run, save, how):
                yield
        finally:
            self._guarded = False
            self.close()

    def announce(self, budgets: Mapping[int, Mapping[str, float]]) -> None:
        """Note what each client's node can carry: its keep ratio and, if measured, the reason."""
        for client, budget in budgets.items():
            self.coordinator.participation.announce(client, budget["keep"])
        self.run.write_budgets(self.run.budgets() | dict(budgets))

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        """Yield the tasks of a round; see `Coordinator.tasks`."""
        if self.coordinator.open is None:  # where tasks outlive rounds, a round asks repeatedly
            self._round_began = time.perf_counter()
            self.live.round(round)
        if self.config.privacy.clip is not None:
            self.run.note_opened(round)  # before anything of it is sent: it counts from here on
        with pinned_threads(self.config.worker.threads):
            yield from self.coordinator.tasks(round, available)

    def receive(self, update: Update, node: int | None = None) -> bool:
        """Take an update; see `Coordinator.receive`."""
        with self.record.timed("aggregate"), pinned_threads(self.config.worker.threads):
            counted = self.coordinator.receive(update, node)
        _answered(self)
        return counted

    def reject(
        self,
        client: int,
        reason: str,
        node: int | None = None,
        nbytes: int = 0,
        fault: Fault = "server",
    ) -> None:
        """Note that a client's update does not count; see `Coordinator.reject`."""
        self.coordinator.reject(client, reason, node, nbytes, fault)
        _answered(self)

    def note_refused(self, nodes: list[dict[str, str]]) -> None:
        """Note nodes that cannot be used; see `Coordinator.note_refused`."""
        self.coordinator.note_refused(nodes)

    def enough(self) -> bool:
        """Whether the round has enough updates; see `Coordinator.enough`."""
        return self.coordinator.enough()

    def close_round(self) -> RoundSummary:
        """Average, write the round's line and checkpoint, draw the small grid where it is due."""
        config, record = self.config, self.record
        with record.timed("aggregate"), pinned_threads(config.worker.threads):
            summary = self.coordinator.close_round()
        summary.seconds = time.perf_counter() - self._round_began
        record.line(summary)
        if summary.round % config.round.checkpoint_every == 0:
            _checkpoint(self)
        self.trackers.round(summary.to_dict())
        self.live.closed(summary.seconds)
        self.page.refresh()
        small_grid(self, summary.round)
        return summary


def exchanges(
    experiment: Experiment, round: int, available: Collection[int] | None = None
) -> Iterator[Iterator[Task]]:
    """Yield the messages of each exchange of a round in turn; without a protocol there is one.

    All answers to an exchange are given to `receive` or `reject` before the next is asked for.
    """
    coordinator = experiment.coordinator
    if not isinstance(coordinator, SecureCoordinator):
        yield experiment.tasks(round, available)
        return
    experiment._round_began = time.perf_counter()
    experiment.live.round(round)
    if experiment.config.privacy.clip is not None:
        experiment.run.note_opened(round)
    threads, parts = experiment.config.worker.threads, coordinator.exchanges(round, available)
    while True:
        with experiment.record.timed("aggregate"), pinned_threads(threads):
            tasks = next(parts, None)
        if tasks is None:
            return
        with pinned_threads(threads):
            yield tasks


def _go_on(experiment: Experiment, found: Standing) -> None:
    """Bring a new experiment to where its run stands, and write that down."""
    run, coordinator = experiment.run, experiment.coordinator
    check_same_data(run, found.config.data, found.checkpoint, experiment._data)
    if found.checkpoint is not None:
        state = found.checkpoint.state
        try:
            coordinator.restore(found.checkpoint.tensors, state["coordinator"])
        except ValueError as error:
            raise ConfigError(f"{run.path} cannot be resumed: {error}.") from error
        experiment.record.go_on(found, state)
        experiment.live.go_on([summary.seconds for summary in found.rounds])
        coordinator.ledger.losses = [line.loss for line in found.rounds if line.clients]
    run.begin_again(found.rounds)
    run.note_beginning(experiment._data)
    if found.config != run.config():
        run.write_config(found.config)  # as it was typed with the command
    if found.changed or found.checkpoint is None:
        _checkpoint(experiment)  # from here on the run is one with the new settings


def _record(experiment: Experiment) -> Record:
    settings, device = experiment.config.to_dict(), experiment.setup.device.type
    origin = origin_of(settings, experiment._data, experiment.run, VERSIONS, device)
    return Record(experiment.run, origin)


def _answered(experiment: Experiment) -> None:
    coordinator = experiment.coordinator
    if (state := coordinator.open) is not None and state.counting:
        overlapping = coordinator.policy.overlapping
        experiment.live.answered(state.target if overlapping else len(state.recipes))


def _checkpoint(experiment: Experiment) -> None:
    coordinator = experiment.coordinator
    experiment.record.checkpoint(coordinator.round, coordinator.tensors(), coordinator.state())


def _save_last(experiment: Experiment) -> None:
    if experiment.record.unsaved(experiment.coordinator.round):
        _checkpoint(experiment)


def write_data(path: Path, dataset: ImageSet | None, setup: Setup) -> None:
    """Write data.json and samples/real.png, where the server has the data, for a first report.

    Under differential privacy no real image is written: what is in samples/ is covered there.
    """
    if dataset is None:
        return
    config = setup.config
    write_clients(path, dataset, setup.shares(dataset), config.data.partition == "folders")
    if config.privacy.clip is None:
        write_real(path, dataset, config.evaluation.grid, setup.classes)


def _round(experiment: Experiment, exchange: Callable[[int], None]) -> RoundSummary:
    """Do one round, and try again while it is below its quorum."""
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
