"""The worker's half of a diagnostic round: what it measures at theta_r beside its training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fed_diffusion.client.images import ClientImages
from fed_diffusion.config import Config
from fed_diffusion.diffusion.loss import Network, NoisyBatch
from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.diagnostics import (
    ASKED,
    CURVED,
    FAILED,
    GRADIENTS,
    L_ERROR,
    LOSS,
    LOSS_ERROR,
    M2,
    TOGETHER,
    L,
)
from fed_diffusion.protocol.messages import MEASURED_LIMIT, Task
from fed_diffusion.theory.curvature import curvature
from fed_diffusion.theory.sketch import Sketch, sampled_gradients

logger = logging.getLogger(__name__)

MINIBATCHES = 2
"""The fewest minibatches, of the run's batch size, that tell noise from gradient."""
MOST_MINIBATCHES = 32
SHARE = 0.02
"""The share of the workers' steps in a run that measuring may cost beyond the fewest
minibatches.
"""
MINIBATCH_STEPS, CURVATURE_STEPS = 1.15, 12.0
"""What a minibatch with its sketch, and a curvature, cost in training steps.

They were measured on digits, where the network is small and the sketch takes its largest share.
"""
MOST_LETTERS = 200
"""The number of letters in the reason why a worker could not measure, at most."""


class Trainer(Protocol):
    """What this module asks of the worker that it measures for; see `Worker`."""

    config: Config
    device: torch.device
    images: ClientImages

    def examples(self, client: int) -> int: ...

    def steps(self, examples: int) -> int: ...

    def minibatches(
        self, theta: dict[str, Tensor], client: int, round: int, count: int, size: int
    ) -> tuple[list[nn.Parameter], Network, Iterator[NoisyBatch]]: ...


def measure(
    worker: Trainer, theta: Mapping[str, Tensor], task: Task
) -> tuple[Numbers, dict[str, Packed]]:
    """Return what the task asks for at theta_r, as it travels; nothing where it asks for nothing.

    Where something cannot be measured (memory, a network without a second derivative, numbers that
    are not finite), the reason travels in its place: an update is worth more than its diagnostics.
    """
    most, products = (int(task.payload.numbers.get(key, 0)) for key in (ASKED, CURVED))  # type: ignore[arg-type]
    if not most:
        return {}, {}
    numbers: Numbers = {}
    arrays: dict[str, Packed] = {}
    try:
        if not (0 < most <= 64 and 0 <= products <= 64):
            raise ValueError(f"the task asks for {most} minibatches and {products} products")
        with torch.random.fork_rng():
            numbers, arrays = _gradients(worker, theta, task, most)
            if products:
                numbers |= _curvature(worker, theta, task, products)
    except Exception as error:
        # whatever it is, in a user's code too: the client's update must not be lost for it
        why = " ".join(f"{type(error).__name__}: {error}".split())
        data = why[:MOST_LETTERS].encode("utf-8", errors="replace")
        text = data.decode("utf-8")  # of a file name that is no text, too: a log must take it
        logger.warning("client %d, round %d: not measured: %s", task.client, task.round, text)
        arrays = arrays | {FAILED: Packed("uint8", (len(data),), data)}
    if FAILED in arrays and worker.device.type == "cuda":
        torch.cuda.empty_cache()  # what a failed try has left is training's
    return numbers, arrays


def minibatches(config: Config, steps: int, workers: int, most: int = MOST_MINIBATCHES) -> int:
    """Return how many minibatches a worker with so many steps measures in a diagnostic round.

    As many as SHARE of its steps in the whole run pay for, beside its part in the one curvature
    that the workers measure.
    """
    due = len(config.diagnostic_rounds())
    affordable = SHARE * steps * config.rounds / max(due, 1) - CURVATURE_STEPS / max(workers, 1)
    count = math.floor(affordable / MINIBATCH_STEPS + 1e-9)
    return max(MINIBATCHES, min(count, most, MOST_MINIBATCHES))


def _gradients(
    worker: Trainer, theta: Mapping[str, Tensor], task: Task, most: int
) -> tuple[Numbers, dict[str, Packed]]:
    """Return losses and sketched gradients of independent minibatches."""
    config = worker.config
    workers = int(task.payload.numbers.get(TOGETHER, 1))  # type: ignore[arg-type]
    count = minibatches(config, worker.steps(worker.examples(task.client)), workers, most)
    parameters, network, drawn = worker.minibatches(
        dict(theta), task.client, task.round, count, config.local.batch
    )
    losses = (partial(batch.loss, network) for batch in drawn)
    values, gradients = sampled_gradients(parameters, losses, Sketch(config.seed))
    data = gradients.to(torch.float32)
    moment = worker.images.second_moment(task.client)
    _check_range(*values, moment, float(data.abs().max()))
    numbers: Numbers = {
        LOSS: math.fsum(values) / count,
        LOSS_ERROR: float(np.std(values, ddof=1)) / math.sqrt(count),
        M2: moment,
    }
    packed = Packed("float32", tuple(data.shape), data.numpy().tobytes())
    return numbers, {GRADIENTS: packed}


def _curvature(worker: Trainer, theta: Mapping[str, Tensor], task: Task, products: int) -> Numbers:
    """Return L of the first minibatch's loss."""
    parameters, network, drawn = worker.minibatches(
        dict(theta), task.client, task.round, 1, worker.config.local.batch
    )
    found = curvature(parameters, network, next(drawn), products)
    numbers: Numbers = {L: found.value, L_ERROR: found.error or 0.0}
    _check_range(found.value, found.error or 0.0)
    return numbers


def _check_range(*values: float) -> None:
    # NaN fails every comparison
    if not all(value <= MEASURED_LIMIT for value in values):
        raise ValueError("what was measured is not finite or out of range")
