"""What a run would take: its size by arithmetic, its time from a few timed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from fed_diffusion.aggregation.stateful import LEVELS
from fed_diffusion.build import Setup, skeleton
from fed_diffusion.client import diagnostics
from fed_diffusion.client.budget import demand
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import Config
from fed_diffusion.data import ImageSet
from fed_diffusion.engines.forecast_evaluation import evaluation_seconds
from fed_diffusion.engines.local import processes_of
from fed_diffusion.engines.timing import SIDE_BY_SIDE, TIMED_S, makespan, multiply_adds, took
from fed_diffusion.models.unet import UNet
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.moments import PREFIXES, is_shared
from fed_diffusion.server.coordinator import Coordinator

START_S = {"local": 5.0, "flower": 16.0}
"""The seconds to the first round and to end the workers, for each engine, on two quiet cores."""
ROUND_S = 0.2
"""The seconds of the server at the end of a round, mostly for the checkpoint on disk."""
MOST_GROUPS = 6
"""The number of different keep ratios that are timed; the others lie between them."""
MOST_STEPS = 8


@dataclass(frozen=True)
class Client:
    """What one client has: training images, held-out ones, images per label, steps a round."""

    number: int
    train: int
    holdout: int
    labels: dict[str, int]
    steps: int


@dataclass(frozen=True)
class Size:
    """The size of a run, by arithmetic alone.

    Attributes
    ----------
    parameters
        The number of parameters that are trained and travel: of the whole network, or of its
        adapter.
    frozen
        The number of values of the base beside an adapter, which stay where they are; else 0.
    macs
        Multiply-adds of the network for one image, forwards; None where they cannot be counted.
    memory
        Bytes of a worker with the whole network above an idle process: parameters, gradients,
        optimiser and activations of a batch; None for a network of the user's own.
    clients
        Each client's images.
    """

    parameters: int
    frozen: int
    macs: float | None
    memory: float | None
    clients: list[Client]


@dataclass(frozen=True)
class Forecast:
    """What a run would take.

    Attributes
    ----------
    seconds
        Part of the run -> seconds on this machine.
    bytes_down, bytes_up
        The bytes of one round, of all clients together.
    processes
        The number of clients at once.
    keeps
        Keep ratio -> how many clients of a round have it.
    step
        Seconds of one training step with the largest of these ratios.
    """

    seconds: dict[str, float]
    bytes_down: float
    bytes_up: float
    processes: int
    keeps: dict[float, int]
    step: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def size_of(config: Config, dataset: ImageSet) -> Size:
    """Everything about a run that needs no training step."""
    setup = Setup.of(config)
    network = setup.skeleton
    return Size(
        parameters=sum(value.numel() for value in network.parameters()),
        frozen=_frozen(config),
        macs=multiply_adds(setup, network),
        memory=demand(setup, network).memory if isinstance(network, UNet) else None,
        clients=_clients(setup, dataset),
    )


def _frozen(config: Config) -> int:
    if config.lora.rank is None:
        return 0
    return sum(value.numel() for value in skeleton(config, adapted=False).parameters())


def _clients(setup: Setup, dataset: ImageSet) -> list[Client]:
    found = []
    for number, (train, held) in enumerate(setup.shares(dataset)):
        labels = dataset.subset(train).per_class() if dataset.labels is not None else {}
        steps = setup.config.local.steps_of(len(train))
        found.append(Client(number, len(train), len(held), labels, steps))
    return found


def forecast(
    config: Config, dataset: ImageSet, *, engine: str = "local", done: int = 0
) -> Forecast:
    """Time a few steps of each part of a run, and return what the whole would take.

    Nothing is written, and what is computed for it is a few seconds' worth.

    Parameters
    ----------
    done
        Rounds that a resumed run has behind it.
    """
    rounds = config.rounds - done
    setup = Setup.of(config)
    clients = _clients(setup, dataset)
    processes = processes_of(config)
    with torch.random.fork_rng():
        timed = _Timed(config, dataset)
        jobs = [timed.seconds(n, clients[n].steps) for n in timed.asked]
        at_once = SIDE_BY_SIDE if min(processes, len(jobs)) > 1 else 1.0
        training = at_once * makespan(jobs, processes) + timed.server + ROUND_S
        measured = _diagnostics(config, timed, clients, done) / max(processes, 1)
        parts = {
            "start": START_S[engine],
            "training": rounds * training + measured,
            **evaluation_seconds(setup, dataset, rounds),
        }
    return Forecast(parts, timed.down, timed.up, processes, timed.keeps, timed.step)


class _Timed:
    """A round's tasks, of which one of each keep ratio is trained for a few steps.

    Attributes
    ----------
    asked
        The clients of the round.
    keep
        Client -> its keep ratio.
    server
        Seconds of the server for all tasks and updates of a round.
    down, up
        Bytes of a round.
    step
        Seconds of a step with the largest network of the round.
    """

    def __init__(self, config: Config, dataset: ImageSet):
        self._config = _with_steps(config, 1)
        setup = Setup.of(self._config)
        self._worker = Worker(setup, dataset)
        coordinator = Coordinator(setup, setup.theta(started=False))
        _announce(config, coordinator, self._worker)
        tasks, made = took(lambda: list(islice(coordinator.tasks(1), 2 * config.clients)))
        state = coordinator.open
        assert state is not None
        keep = {task.client: state.recipes[task.client].keep for task in tasks}
        self.asked = [task.client for task in tasks]
        self.keeps = {k: list(keep.values()).count(k) for k in sorted(set(keep.values()))}
        self.down = float(sum(task.payload.nbytes for task in tasks))
        first = {keep[task.client]: task for task in reversed(tasks)}
        ratios = sorted(first)
        chosen = {ratios[round(i)] for i in np.linspace(0, len(ratios) - 1, MOST_GROUPS)}
        self._at = sorted(chosen)
        self._fixed, self._step, up, received = [], [], [], 0.0
        for ratio in self._at:
            fixed, step, update = self._time(first[ratio])
            self._fixed.append(fixed)
            self._step.append(step)
            up.append(_bytes_up(config, update))
            received = max(received, took(lambda u=update: coordinator.receive(u))[1])  # type: ignore[misc]
        self.keep = keep
        self.up = sum(float(np.interp(k, self._at, up)) for k in keep.values())
        self.step = self._step[-1]
        self.server = made + received * len(tasks)

    def seconds(self, client: int, steps: int) -> float:
        """Return what a client's task of so many steps takes a worker, in seconds."""
        keep = self.keep[client]
        fixed, step = (float(np.interp(keep, self._at, y)) for y in (self._fixed, self._step))
        return fixed + steps * step

    def _time(self, task: Task) -> tuple[float, float, Update]:
        """Return the seconds that a task takes beside its steps, and those of a step."""
        self._worker.config = self._config
        self._worker.run(task)  # the first call loads what later ones share
        update, one = took(lambda: self._worker.run(task))
        more = max(1, min(MOST_STEPS, int(TIMED_S / max(one, 1e-3))))
        self._worker.config = _with_steps(self._config, 1 + more)
        step = max(took(lambda: self._worker.run(task))[1] - one, 0.0) / more
        return max(one - step, 0.0), step, update


WORD = 8
"""Bytes of a value in a masked vector."""


def _bytes_up(config: Config, update: Update) -> int:
    """The bytes of an update; under secure aggregation it is whole numbers for each value."""
    if not config.secure.aggregation:
        return update.payload.nbytes
    arrays = update.payload.arrays.items()
    kept = sum(math.prod(it.shape) for name, it in arrays if not name.startswith(PREFIXES))
    return WORD * kept * (3 * LEVELS if is_shared(config.local) else 1)


def _with_steps(config: Config, steps: int) -> Config:
    """Return the run with so few steps a round, and nothing measured beside them."""
    return config.model_copy(
        update={
            "local": config.local.model_copy(update={"steps": steps, "epochs": None}),
            "theory": config.theory.model_copy(update={"every": 0}),
        }
    )


def _announce(config: Config, coordinator: Coordinator, worker: Worker) -> None:
    """Announce keep ratios that nodes would say: what this machine carries, or the whole
    network.
    """
    if config.pruning.budget == "level":
        return
    keep = worker.budget().keep if config.pruning.budget == "auto" else 1.0
    for client in range(config.clients):
        coordinator.participation.announce(client, keep)


def _diagnostics(config: Config, timed: _Timed, clients: list[Client], done: int) -> float:
    """Seconds of all workers in the diagnostic rounds that are left, beside their training."""
    due = sum(round > done for round in config.diagnostic_rounds())
    whole = [n for n in timed.asked if timed.keep[n] == 1]
    if not due or not whole:
        return 0.0
    counts = [diagnostics.minibatches(config, clients[n].steps, len(whole)) for n in whole]
    steps = diagnostics.MINIBATCH_STEPS * sum(counts) + diagnostics.CURVATURE_STEPS
    return due * steps * timed.step
