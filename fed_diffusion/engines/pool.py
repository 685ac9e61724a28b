"""What runs tasks in process: one resident worker, or a pool of processes with one in each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from types import ModuleType
from typing import Any, Protocol

import torch

from fed_diffusion.build import Setup
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.compute import device_of
from fed_diffusion.config import Config
from fed_diffusion.data import ImageSet
from fed_diffusion.engines.signals import STOP_SIGNALS, signals_held
from fed_diffusion.experiment import RunStopped
from fed_diffusion.protocol.messages import Task, Update

logger = logging.getLogger(__name__)
Order = tuple[str, dict[str, Any]]
"""A worker's device, and for one that was forked ahead the settings of the run."""


class Runner(Protocol):
    """Runs tasks and yields (task, update or the exception that ended it) as they finish."""

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]: ...


@contextmanager
def task_runner(run: Config | Setup, dataset: ImageSet, processes: int) -> Iterator[Runner]:
    """Runs tasks in this process, or in a pool of the standard library's processes."""
    if processes == 1:
        yield _InTurn(Worker(run, dataset))
        return
    runner = _InProcesses(Setup.of(run).config, processes)
    try:
        yield runner
    finally:
        runner.end()


@contextmanager
def forked_ahead(processes: int) -> Iterator[None]:
    """Fork the workers of the run that begins in this block: they need not import anything.

    This is for a process that has imported torch and not used it yet, since torch's threads do not
    survive a fork. One process is none beside this one.
    """
    if processes == 1:
        yield
        return
    context = multiprocessing.get_context("fork")
    orders = context.SimpleQueue()
    pool = ProcessPoolExecutor(processes, context, _start_process, (orders,))
    pool.submit(os.getpid)  # the first task starts all of them, and they wait for their settings
    _ahead[processes] = pool, orders
    try:
        yield
    finally:
        for unused, _ in _ahead.values():
            _end(unused)
        _ahead.clear()


_ahead: dict[int, tuple[ProcessPoolExecutor, SimpleQueue[Order]]] = {}
"""The number of processes -> a pool of so many that were forked ahead, until a run takes it."""


class _InTurn:
    """One resident model, for one client after another."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]:
        for task in tasks:
            try:
                yield task, self._worker.run(task)
            except Exception as error:  # a client that fails costs its own update
                yield task, error


class _InProcesses:
    """A pool of processes, each with its resident model and at most one task ahead.

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

    def end(self) -> None:
        _end(self._pool)

    def _submit(self, task: Task) -> Future[Update]:
        with _main_module_hidden():
            try:
                return self._pool.submit(_run_task, task)
            # no process can be started, or the pool broke meanwhile and its pipes are closed
            except (OSError, ValueError) as error:
                raise BrokenProcessPool(f"{type(error).__name__}: {error}") from error

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
    settings = config.to_dict()
    if processes in _ahead:
        pool, orders = _ahead.pop(processes)
        for _ in range(processes):
            orders.put((config.worker.device, settings))
        return pool
    # spawn, not fork: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    orders = context.SimpleQueue()
    for process in range(processes):
        orders.put((_device_of_process(config, process), {}))
    return ProcessPoolExecutor(processes, context, _start_process, (orders, settings))


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool's workers at once: nobody wants what they may still compute.

    It would take minutes to wait for their tasks, and a second signal meanwhile would leave them
    and this process waiting for each other for ever. It would take a second to let them end by
    themselves.
    """
    with signals_held():
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)


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
    if device_of(config.worker) != torch.device("cuda"):
        return config.worker.device
    return f"cuda:{process % torch.cuda.device_count()}"


def _start_process(orders: SimpleQueue[Order], settings: dict[str, Any] | None = None) -> None:
    """Make the worker of this process.

    Parameters
    ----------
    settings
        The run's settings; None where they come with the order.
    """
    global _worker
    for number in STOP_SIGNALS:  # a forked process has its parent's handlers
        if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup wants
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device, found = orders.get()
    settings = settings or found
    settings["worker"]["device"] = device
    _worker = Worker(Config.model_validate(settings))


def _end_with_parent() -> None:
    """End this worker with its parent: a killed parent cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(task: Task) -> Update:
    assert _worker is not None
    return _worker.run(task)
