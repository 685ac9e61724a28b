"""Both sides of a run on this machine, without Flower: for tests, notebooks and one GPU."""

from __future__ import annotations

import heapq
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import device_of
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import ImageSet
from fed_diffusion.experiment import Experiment, Progress, RunStopped
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.server.buffered import BufferedCoordinator

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs tasks and yields (task, update or the exception that ended it) as they finish."""

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]: ...


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
        Called with each round's line of metrics.
    """
    return run_in_process(Experiment(config, out), processes=processes, progress=progress)


def run_in_process(
    experiment: Experiment, *, processes: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a new or resumed experiment to its end; see `simulate`.

    The deadline of a round is for real machines: clients in turn would miss it all.
    """
    config = experiment.config
    assert experiment.dataset is not None
    if processes is None:
        processes = max(1, usable_cores() // config.worker.threads)
        if (device := device_of(config)).type == "cuda":
            processes = 1 if device.index is not None else torch.cuda.device_count()
    with experiment.guarded():
        announce_budgets(experiment)
        with task_runner(config, experiment.dataset, min(processes, config.clients)) as run:
            if config.round.mode == "buffered":
                return experiment.train(BufferedExchange(experiment, run), progress)
            return experiment.train(lambda round: exchange(experiment, run, round), progress)


def exchange(experiment: Experiment, run: Runner, round: int) -> None:
    """Carry a round's tasks to the runner, and what comes of them back."""
    coordinator, pace = experiment.coordinator, experiment.config.round.pace
    slowest = 0.0
    for task, outcome in run(experiment.tasks(round)):
        _deliver(experiment, task, outcome)
        slowest = max(slowest, pace[task.client] if pace else 0.0)
        if experiment.enough():
            break
    coordinator.clock += slowest
    for client in coordinator.waiting():
        experiment.reject(client, "there were enough updates without it")


def _deliver(experiment: Experiment, task: Task, outcome: Update | Exception) -> None:
    if isinstance(outcome, Update) and outcome.client == task.client:
        experiment.receive(outcome)
    elif isinstance(outcome, Update):
        reason = f"the reply is for client {outcome.client}"
        experiment.reject(task.client, reason, nbytes=outcome.payload.nbytes)
    else:
        experiment.reject(task.client, f"{type(outcome).__name__}: {outcome}")


class BufferedExchange:
    """Buffered rounds on a simulated clock: updates arrive in the order of round.pace.

    A task is computed when it is sent and delivered when its time has come. Ties go to the lower
    client, so the order is a function of the configuration alone.
    """

    def __init__(self, experiment: Experiment, run: Runner):
        self._experiment = experiment
        self._run = run
        self._arrivals: list[tuple[float, int, Task, Update | Exception]] = []
        coordinator = experiment.coordinator
        assert isinstance(coordinator, BufferedCoordinator)
        self._coordinator = coordinator
        # of a resumed run: what was out is out again, and arrives when it would have
        for client in coordinator.waiting():
            self._send([coordinator.again(client)], coordinator.sent_at[client])

    def __call__(self, round: int) -> None:
        coordinator = self._coordinator
        self._send(self._experiment.tasks(round), coordinator.clock)
        while self._arrivals and not self._experiment.enough():
            arrives, _, task, outcome = heapq.heappop(self._arrivals)
            coordinator.clock = max(coordinator.clock, arrives)
            _deliver(self._experiment, task, outcome)

    def _send(self, tasks: Iterable[Task], now: float) -> None:
        pace = self._experiment.config.round.pace
        for task, outcome in self._run(tasks):
            self._coordinator.sent_at[task.client] = now
            arrives = now + (pace[task.client] if pace else 1.0)
            heapq.heappush(self._arrivals, (arrives, task.client, task, outcome))


def announce_budgets(experiment: Experiment) -> None:
    """All clients of a simulation live on this machine: it measures once, for all of them.

    Raises
    ------
    ConfigError
        pruning.budget is `node`, and here are no nodes.
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
        budget = Worker(config, experiment.dataset).budget().to_metrics()
        experiment.announce(dict.fromkeys(range(config.clients), budget))


@contextmanager
def task_runner(config: Config, dataset: ImageSet, processes: int) -> Iterator[Runner]:
    """Runs tasks in this process, or in a pool of the standard library's processes."""
    if processes == 1:
        yield _InTurn(Worker(config, dataset))
        return
    runner = _InProcesses(config, processes)
    try:
        yield runner
    finally:
        runner.close()


class _InTurn:
    """One resident model, clients one after another."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]:
        for task in tasks:
            try:
                yield task, self._worker.run(task)
            except Exception as error:  # a client that fails costs its own update
                yield task, error


class _InProcesses:
    """A pool of processes, each with its resident model; at most one task ahead of each.

    When one of them is killed (the system is out of memory, as a rule), the pool is useless; a new
    one does the lost tasks again, once in a round, and comes to the same bits.
    """

    def __init__(self, config: Config, processes: int):
        self._config, self._processes = config, processes
        self._pool = _new_pool(config, processes)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]:
        waiting: dict[Future[Update], Task] = {}
        lost: list[Task] = []
        remaining, broken, renewed = iter(tasks), False, False
        while True:
            while not broken and len(waiting) < 2 * self._processes:
                task = lost.pop() if lost else next(remaining, None)
                if task is None:
                    break
                try:
                    waiting[self._submit(task)] = task
                except BrokenProcessPool:
                    lost.append(task)
                    broken = True
            if not waiting and not broken:
                return
            if not waiting:
                self._renew(lost[0].round, renewed)
                broken, renewed = False, True
                continue
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                task, error = waiting.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    lost.append(task)
                    broken = True
                elif error is not None and not isinstance(error, Exception):
                    raise error
                else:
                    yield task, error if error is not None else future.result()

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(self, task: Task) -> Future[Update]:
        with _main_module_hidden():
            return self._pool.submit(_run_task, task)

    def _renew(self, round: int, renewed: bool) -> None:
        problem = (
            f"round {round}: a worker process ended before its task did. It was killed, or the "
            "machine is out of memory (fewer processes at once need less), or it could not start "
            "(its own words are above)."
        )
        if renewed:
            raise RunStopped(f"{problem} That was the second time in this round.")
        logger.warning("%s New ones take over.", problem)
        self._pool.shutdown()
        self._pool = _new_pool(self._config, self._processes)


def _new_pool(config: Config, processes: int) -> ProcessPoolExecutor:
    # spawn, not fork: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for process in range(processes):
        devices.put(_device_of_process(config, process))
    return ProcessPoolExecutor(processes, context, _start_process, (config.to_dict(), devices))


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Start processes that do not run the user's script again.

    A spawned process imports the main module, so a script that calls `simulate` without
    `if __name__ == "__main__":` would begin the same run in every worker. Workers need nothing of
    it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_worker: Worker | None = None


def _device_of_process(config: Config, process: int) -> str:
    """Several GPUs share the clients; a device that is named by its number is meant alone."""
    if device_of(config) != torch.device("cuda"):
        return config.worker.device
    return f"cuda:{process % torch.cuda.device_count()}"


def _start_process(settings: dict[str, Any], devices: SimpleQueue[str]) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings["worker"]["device"] = devices.get()
    _worker = Worker(Config.model_validate(settings))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for a task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(task: Task) -> Update:
    assert _worker is not None
    return _worker.run(task)
