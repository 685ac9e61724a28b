"""Diagnostic rounds: what Theorem 4.11 asks of a run, measured beside training.

In the first and the last round, and every `theory.every` rounds, the server asks workers that hold
the whole network for their loss and M_2, and for sketches of two stochastic gradients at theta_r;
one of them for a curvature too. A worker under a mask is not asked: it does not know theta_r.
Training is not touched: its bits are those of a run without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.federation.aggregate import UpdateError
from fed_diffusion.federation.codecs import Packed
from fed_diffusion.federation.records import MEASURED_LIMIT, Task, Update
from fed_diffusion.masks.recipes import Numbers
from fed_diffusion.rng import Purpose, generator
from fed_diffusion.theory.estimates import (
    SKETCH,
    Estimate,
    Sketch,
    gradient_distance,
    gradient_norm,
    gradient_variance,
    hessian_vector,
    largest_curvature,
    mean,
    sampled_gradients,
    secant,
)

if TYPE_CHECKING:
    from fed_diffusion.federation.worker import Worker

MINIBATCHES = 2
"""Of the run's batch size: the fewest that tell noise from gradient."""
PRODUCTS = 3
"""Hessian products behind a curvature."""
MOST_WORKERS = 32
"""Asked in one round: their sketches are the server's memory, whatever the number of clients."""
ASKED, CURVED = "diagnostic.minibatches", "diagnostic.products"
GRADIENTS = "diagnostic.gradients"
LOSS, M2, L, L_ERROR = "diagnostic.loss", "diagnostic.M2", "diagnostic.L", "diagnostic.L_error"


def is_due(config: Config, round: int) -> bool:
    """Whether a round (1-based) is a diagnostic one.

    Never under privacy, where a gradient would leave its client unclipped, and never in buffered
    rounds, whose workers train on different theta.
    """
    every = config.theory.every
    if every == 0 or config.privacy.clip is not None or config.round.mode != "synchronous":
        return False
    return round in (1, config.rounds) or (every is not None and round % every == 0)


# --- the worker's side --------------------------------------------------------------------------


def measure(
    worker: Worker, theta: Mapping[str, Tensor], task: Task
) -> tuple[Numbers, dict[str, Packed]]:
    """What the task asks for at theta_r, as it travels; nothing where it asks for nothing."""
    count, products = (int(task.payload.numbers.get(key, 0)) for key in (ASKED, CURVED))  # type: ignore[arg-type]
    if not count:
        return {}, {}
    if not (2 <= count <= 64 and 0 <= products <= 64):
        raise ValueError(f"the task asks for {count} minibatches and {products} products")
    config = worker.config
    parameters, drawn = worker.minibatches(
        dict(theta), task.client, task.round, count, config.local.batch
    )
    losses = list(drawn)
    values, gradients = sampled_gradients(parameters, losses, Sketch(config.seed))
    numbers: Numbers = {LOSS: math.fsum(values) / count, M2: worker.second_moment(task.client)}
    if products:
        found = torch.autograd.grad(
            losses[0](), parameters, materialize_grads=True, allow_unused=True
        )
        start = torch.cat([gradient.reshape(-1) for gradient in found])
        curvature = largest_curvature(hessian_vector(parameters, losses[0]), start, products)
        numbers |= {L: curvature.value, L_ERROR: curvature.error or 0.0}
    data = gradients.to(torch.float32).numpy().tobytes()
    return numbers, {GRADIENTS: Packed("float32", tuple(gradients.shape), data)}


# --- the server's side --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One worker's measurements, checked; on the scale of the simple loss.

    Attributes
    ----------
    gradients
        Sketches, float64 [m, k].
    curvature
        L by power iteration, and how far it may be from an eigenvalue.
    """

    loss: float
    M2: float
    gradients: Tensor
    curvature: Estimate | None


@dataclass
class _Open:
    """The diagnostic round in progress."""

    theta: Tensor
    """Sketched."""
    asked: dict[int, int]
    """client -> Hessian products."""
    answers: dict[int, Answer] = field(default_factory=dict)


class Diagnostics:
    """Asks in diagnostic rounds, and makes estimates of the answers.

    Between rounds it keeps the last sketches, for the secant estimate of L.
    """

    def __init__(self, config: Config):
        self._config = config
        self._sketch = Sketch(config.seed)
        self._open: _Open | None = None
        self._last: tuple[Tensor, dict[int, Tensor]] | None = None
        """Sketches of theta, and of each worker's gradients at it."""

    def open(self, round: int, theta: Mapping[str, Tensor], whole: Iterable[int]) -> None:
        """Begin a round at theta_r; `whole` are its workers that hold the whole network."""
        self._open = None
        order = generator(self._config.seed, Purpose.DIAGNOSTIC).permutation(self._config.clients)
        rank = dict(zip(order.tolist(), range(len(order)), strict=True))
        chosen = sorted(whole, key=lambda client: rank[client])[:MOST_WORKERS]
        if not chosen or not is_due(self._config, round):
            return
        asked = dict.fromkeys(chosen, 0) | {chosen[0]: PRODUCTS}
        self._open = _Open(self._sketch(theta.values()), asked)

    def question(self, client: int) -> Numbers:
        """What a task asks of its client beside training."""
        if self._open is None or client not in self._open.asked:
            return {}
        numbers: Numbers = {ASKED: MINIBATCHES}
        if products := self._open.asked[client]:
            numbers[CURVED] = products
        return numbers

    def split(self, update: Update) -> tuple[dict[str, Packed], Answer | None]:
        """The update's tensors without the client's answer, and the answer if there is one.

        Raises
        ------
        UpdateError
            The answer is not of the agreed shape, or not finite.
        """
        arrays = dict(update.payload.arrays)
        if self._open is None or update.client not in self._open.asked or GRADIENTS not in arrays:
            return arrays, None
        return arrays, _answer(arrays.pop(GRADIENTS), update.payload.numbers)

    def add(self, client: int, answer: Answer | None) -> None:
        """Take an answer whose update counts."""
        if answer is not None and self._open is not None:
            self._open.answers[client] = answer

    def close(self) -> dict[str, Any] | None:
        """The round's estimates on the scale of the simple loss; None where nothing was measured.

        sigma_2 and the gradient's norm are of the mean over the workers that answered.
        """
        state, self._open = self._open, None
        if state is None or not state.answers:
            return None
        answers = dict(sorted(state.answers.items()))
        gradients = {client: answer.gradients for client, answer in answers.items()}
        stacked = torch.stack(list(gradients.values()))
        found: dict[str, Estimate] = {
            "F": mean([answer.loss for answer in answers.values()]),
            "sigma1": gradient_variance(stacked).root(),
            "gradient": gradient_norm(stacked).root(),
        }
        if len(answers) > 1:
            found["sigma2"] = gradient_distance(stacked).root()
        elif self._config.clients == 1:
            found["sigma2"] = Estimate(0.0, 0.0)
        curvatures = [a.curvature for a in answers.values() if a.curvature is not None]
        if curvatures:
            found["L"] = max(curvatures, key=lambda estimate: estimate.value)
        if (slope := self._secant(state.theta, gradients)) is not None:
            found["L_secant"] = slope
        self._last = state.theta, gradients
        return {
            "workers": len(answers),
            "M2": max(answer.M2 for answer in answers.values()),
            "Fn": max(answer.loss for answer in answers.values()),
            "estimates": {name: estimate.to_dict() for name, estimate in found.items()},
        }

    def _secant(self, theta: Tensor, gradients: Mapping[int, Tensor]) -> Estimate | None:
        """Over the way since the last diagnostic round, by the workers that answered both times.

        The distance is the sketches', with a standard error of 1 / sqrt(2 k): 2 %.
        """
        if self._last is None:
            return None
        before_theta, before = self._last
        both = sorted(before.keys() & gradients.keys())
        distance = float(torch.linalg.vector_norm(theta - before_theta))
        if not both or distance == 0:
            return None
        return secant(
            torch.stack([before[client] for client in both]),
            torch.stack([gradients[client] for client in both]),
            distance,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        if self._last is None:
            return {}
        theta, gradients = self._last
        return {"theta": theta} | {str(client): part for client, part in gradients.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        parts = dict(tensors)
        theta = parts.pop("theta", None)
        self._last = None if theta is None else (theta, {int(c): part for c, part in parts.items()})


def _answer(packed: Packed, numbers: Mapping[str, Any]) -> Answer:
    shape = (MINIBATCHES, SKETCH)
    fits = packed.dtype == "float32" and packed.shape == shape
    if not fits or len(packed.data) != 4 * math.prod(shape):
        raise UpdateError(
            f"{GRADIENTS} is {packed.dtype} {packed.shape} of {len(packed.data)} bytes, "
            f"not float32 {shape}"
        )
    gradients = torch.from_numpy(np.frombuffer(packed.data, "<f4").reshape(shape).astype("f8"))
    try:
        loss, moment = float(numbers[LOSS]), float(numbers[M2])
        curved = (float(numbers[L]), float(numbers[L_ERROR])) if L in numbers else ()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UpdateError(f"diagnostic missing or not a number: {error}") from error
    # NaN fails every comparison
    legal = all(0 <= value <= MEASURED_LIMIT for value in (loss, moment, *curved))
    if not legal or not bool((gradients.abs() <= MEASURED_LIMIT).all()):
        raise UpdateError("diagnostics are not finite or out of range")
    return Answer(loss, moment, gradients, Estimate(*curved, lower=True) if curved else None)
