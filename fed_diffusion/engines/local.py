"""Both sides of a run on this machine, without Flower: for tests, notebooks and one GPU.

One round goes through the program like this:

1. `experiment.Experiment.train` calls this file's `Exchange` with the number of the round.
2. `server/coordinator.py` opens the round: `server/policies.py` says which clients are asked (of
   those that `server/participation.py` knows to be eligible), `masks/plan.py` gives each one the
   recipe of its mask (`masks/recipe.py`), and `server/rounds.py` makes its task of theta_r under
   that mask, as `protocol/wire.py` encodes it.
3. A runner (`engines/pool.py`) gives the task to a `client/worker.py`, which takes the local steps
   of equation (7) and sends an update back (`protocol/messages.py`).
4. The coordinator looks the client's task up in `server/open_round.py`; `server/rounds.py` checks
   the update and adds it to the sums of equation (8) in `aggregation/mean.py`.
5. When there are enough, the coordinator closes the round: theta and its moving average move, and
   `server/summary.py` writes the round's line, which the experiment stores with a checkpoint.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import device_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.engines.pool import Runner, task_runner
from fed_diffusion.engines.secure import SecureRunner
from fed_diffusion.engines.signals import raise_lost_interrupt
from fed_diffusion.experiment import Experiment, Progress, exchanges
from fed_diffusion.protocol.messages import Task, Update

Arrival = tuple[float, int, Task, Update | Exception]
"""When an answer comes on the simulated clock, its client, the task and the outcome."""


def simulate(
    config: Config,
    out: str | Path,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the whole experiment and return its results.

    Parameters
    ----------
    out
        The run directory.
    processes
        Clients at once; default: cores / worker.threads on the CPU, one on each GPU. The parameters
        that come out do not depend on it.
    progress
        A function that is called with each round's line of metrics.
    """
    return run_in_process(Experiment(config, out), processes=processes, progress=progress)


def run_in_process(
    experiment: Experiment, *, processes: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a new or resumed experiment to its end; see `simulate`.

    The deadline of a round is for real machines: clients that train in turn would all miss it.
    """
    config = experiment.config
    assert experiment.dataset is not None
    at_once = processes_of(config) if processes is None else min(processes, config.clients)
    with experiment.guarded():
        announce_budgets(experiment)
        with task_runner(experiment.setup, experiment.dataset, at_once) as run:
            if config.secure.aggregation:
                run = SecureRunner(experiment.setup, run)
            return experiment.train(Exchange(experiment, run), progress)


def processes_of(config: Config) -> int:
    """Return the number of clients at once: cores / worker.threads on the CPU, one on each GPU."""
    processes = max(1, usable_cores() // config.worker.threads)
    if (device := device_of(config.worker)).type == "cuda":
        processes = 1 if device.index is not None else torch.cuda.device_count()
    return min(processes, config.clients)


class Exchange:
    """Carries a round's tasks to the runner, and what comes of them back: the loop of this engine.

    Where tasks end with their round, answers are delivered as the runner finishes them. Where they
    outlive it, a task is computed when it is sent and delivered when its time on the simulated
    clock has come, which `round.pace` says; ties go to the lower client, so that the order is a
    function of the configuration alone.
    """

    def __init__(self, experiment: Experiment, run: Runner):
        self._experiment = experiment
        self._run = run
        self._coordinator = experiment.coordinator
        self._overlapping = experiment.coordinator.policy.overlapping
        self._out: list[Arrival] = []
        """The answers whose time has not come: a heap."""
        # of a resumed run: what was out is out again, and arrives when it would have
        for client in self._coordinator.waiting():
            sent_at = self._coordinator.flights.sent_at[client]
            self._send([self._coordinator.again(client)], sent_at)

    def __call__(self, round: int) -> None:
        """Send one round's tasks, and take answers until there are enough."""
        raise_lost_interrupt()
        for tasks in exchanges(self._experiment, round):
            self._exchange(tasks)

    def _exchange(self, tasks: Iterator[Task]) -> None:
        coordinator = self._coordinator
        for arrives, _, task, outcome in self._arrivals(tasks):
            coordinator.clock = max(coordinator.clock, arrives)
            self._deliver(task, outcome)
            if self._experiment.enough():
                break
        if not self._overlapping:
            for client in coordinator.waiting():
                self._experiment.reject(client, "there were enough updates without it")

    def _arrivals(self, tasks: Iterator[Task]) -> Iterator[Arrival]:
        now = self._coordinator.clock
        if not self._overlapping:
            yield from self._answers(tasks, now)
            return
        self._send(tasks, now)
        while self._out and not self._experiment.enough():
            yield heapq.heappop(self._out)

    def _send(self, tasks: Iterable[Task], now: float) -> None:
        for arrival in self._answers(tasks, now):
            self._coordinator.flights.sent_at[arrival[1]] = now
            heapq.heappush(self._out, arrival)

    def _answers(self, tasks: Iterable[Task], now: float) -> Iterator[Arrival]:
        """Return what the runner makes of tasks that are sent now."""
        pace = self._experiment.config.round.pace
        if self._coordinator.open is not None and not self._coordinator.open.counting:
            pace = None  # only training takes time on the simulated clock
        # a clock that nobody has set stands still, but for the order of overlapping tasks
        usual = 1.0 if self._overlapping else 0.0
        for task, outcome in self._run(tasks):
            yield now + (pace[task.client] if pace else usual), task.client, task, outcome

    def _deliver(self, task: Task, outcome: Update | Exception) -> None:
        experiment = self._experiment
        if isinstance(outcome, Update) and outcome.client == task.client:
            experiment.receive(outcome)
        elif isinstance(outcome, Update):
            reason = f"the reply is for client {outcome.client}"
            experiment.reject(task.client, reason, nbytes=outcome.payload.nbytes)
        else:
            experiment.reject(task.client, f"{type(outcome).__name__}: {outcome}")


def announce_budgets(experiment: Experiment) -> None:
    """Measure this machine once, for all clients of the simulation.

    Raises
    ------
    ConfigError
        pruning.budget is `node`, but in one process there are no nodes.
    """
    config = experiment.config
    if config.pruning.budget == "node":
        raise ConfigError(
            "pruning.budget = 'node' takes keep ratios from Flower nodes, and in one process there "
            "are none; give pruning.keep one ratio per client, or use --engine flower."
        )
    if config.pruning.budget == "auto" and (known := experiment.run.budgets()):
        experiment.announce(known)  # a resumed run goes on as it was
    elif config.pruning.budget == "auto":
        budget = Worker(experiment.setup, experiment.dataset).budget().to_metrics()
        experiment.announce(dict.fromkeys(range(config.clients), budget))
