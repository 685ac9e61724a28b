"""Diagnostic rounds: what Theorem 4.11 asks of a run, measured beside training.

In the first and the last round, and every `theory.every` rounds, the server asks workers that hold
the whole network for their loss and M_2, and for sketches of stochastic gradients at theta_r; one
of them for a curvature too. A worker under a mask is not asked: it does not know theta_r. Training
is not touched: its bits are those of a run without, and a worker that cannot measure says why and
trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.client.diagnostics import (
    MINIBATCHES,
    MOST_LETTERS,
    MOST_MINIBATCHES,
)
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.common.text import clean
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
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import MEASURED_LIMIT, Update
from fed_diffusion.server.divergence import OUTLIER, usual_mean
from fed_diffusion.theory.estimates import (
    Estimate,
    gradient_distance,
    gradient_norm,
    gradient_variance,
    largest,
    largest_of,
    mean,
    secant,
    worker_distances,
)
from fed_diffusion.theory.sketch import SKETCH, Sketch

PRODUCTS = 3
"""The number of Hessian products behind a curvature."""
MOST_WORKERS = 32
"""The number of workers that are asked in one round, since their sketches fill server memory."""


@dataclass(frozen=True)
class Answer:
    """One worker's measurements, checked, on the scale of the simple loss.

    Attributes
    ----------
    loss, loss_error
        The mean over the minibatches, and its standard error.
    gradients
        Sketches, float64 [m, k].
    curvature
        L by power iteration, and how far it may be from an eigenvalue. It is of one minibatch's
        loss, which is more curved than F_n: no estimate from below.
    """

    loss: float
    loss_error: float
    M2: float
    gradients: Tensor
    curvature: Estimate | None


@dataclass
class _Open:
    """The diagnostic round in progress."""

    round: int
    theta: Tensor
    """The sketch of theta_r."""
    asked: dict[int, int]
    """Client -> the number of Hessian products that it was asked for."""
    answers: dict[int, Answer] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    """Client -> why it could not measure, or not everything."""


class Diagnostics:
    """Diagnostics ask workers in diagnostic rounds, and make estimates of the answers.

    Between rounds it keeps the last sketches, for the secant estimate of L.
    """

    def __init__(self, setup: Setup):
        self._config = config = setup.config
        self._sketch = Sketch(config.seed)
        self._d = setup.d
        self._open: _Open | None = None
        self._last: tuple[Tensor, dict[int, Tensor]] | None = None
        """The sketch of theta at the last diagnostic round, and of each worker's gradients at
        it.
        """

    def open(self, round: int, theta: Mapping[str, Tensor], whole: Iterable[int]) -> None:
        """Begin a round at theta_r; `whole` are its workers that hold the whole network."""
        self._open = None
        order = generator(self._config.seed, Purpose.DIAGNOSTIC).permutation(self._config.clients)
        rank = dict(zip(order.tolist(), range(len(order)), strict=True))
        chosen = sorted(whole, key=lambda client: rank[client])[:MOST_WORKERS]
        if not chosen or not self._config.is_diagnostic(round):
            return
        asked = dict.fromkeys(chosen, 0) | {chosen[0]: PRODUCTS}
        self._open = _Open(round, self._sketch(theta.values()), asked)

    def question(self, client: int) -> Numbers:
        """Return what a task asks of its client beside training."""
        if self._open is None or client not in self._open.asked:
            return {}
        numbers: Numbers = {ASKED: MOST_MINIBATCHES, TOGETHER: len(self._open.asked)}
        if products := self._open.asked[client]:
            numbers[CURVED] = products
        return numbers

    def split(self, update: Update) -> tuple[dict[str, Packed], Answer | None]:
        """Return the update's tensors without the client's answer, and the answer or why there is
        none.

        Raises
        ------
        UpdateError
            The answer is not of the agreed shape, or not finite.
        """
        arrays = dict(update.payload.arrays)
        if self._open is None or update.client not in self._open.asked:
            return arrays, None
        failed, gradients = arrays.pop(FAILED, None), arrays.pop(GRADIENTS, None)
        if failed is not None:
            self._open.unanswered[update.client] = _reason(failed)
        if gradients is None:
            return arrays, None
        return arrays, _answer(gradients, update.payload.numbers, self._d)

    def add(self, client: int, answer: Answer | None) -> None:
        """Take an answer whose update counts."""
        if answer is not None and self._open is not None:
            self._open.answers[client] = answer

    def close(self) -> dict[str, Any] | None:
        """Return the round's estimates on the scale of the simple loss; None where nobody was
        asked.

        sigma_1 and the gradient are of the mean over the workers that answered, sigma_2 and F_n of
        the worker where it is largest. `squares` and `distances` (of each worker) are before the
        root, where several rounds are averaged; they are unbiased, and can be below 0. An answer
        whose loss is far above the others' is left out: one worker must not own the bound.
        """
        state, self._open = self._open, None
        if state is None or not (state.answers or state.unanswered):
            return None
        answers = _usual(state)
        unanswered = [
            {"client": client, "reason": reason}
            for client, reason in sorted(state.unanswered.items())
        ]
        if not answers:
            return {"workers": 0, "unanswered": unanswered, "estimates": {}}
        gradients = {client: answer.gradients for client, answer in answers.items()}
        squares, distances = self._squares(gradients)
        F = mean([answer.loss for answer in answers.values()])
        found: dict[str, Estimate] = {
            "F": F,
            "Fn": _largest_loss(answers),
            "sigma1": squares["sigma1"].root(),
            "gradient": squares["gradient"].root(),
        }
        if "sigma2" in squares:
            found["sigma2"] = largest(list(distances.values()), squares["sigma2"]).root()
        curvatures = [a.curvature for a in answers.values() if a.curvature is not None]
        if curvatures:
            found["L"] = max(curvatures, key=lambda estimate: estimate.value)
        if (slope := self._secant(state.theta, gradients)) is not None:
            found["L_secant"] = slope
        self._last = state.theta, gradients
        return {
            "workers": len(answers),
            "minibatches": min(len(part) for part in gradients.values()),
            "M2": max(answer.M2 for answer in answers.values()),
            "estimates": {name: estimate.to_dict() for name, estimate in found.items()},
            "squares": {name: square.to_dict() for name, square in squares.items()},
            "distances": {str(client): part.to_dict() for client, part in distances.items()},
            "unanswered": unanswered,
        }

    def _squares(
        self, gradients: Mapping[int, Tensor]
    ) -> tuple[dict[str, Estimate], dict[int, Estimate]]:
        """Return sigma_1^2, sigma_2^2 (means over workers) and ||grad F||^2, and each one's
        sigma_2^2.
        """
        stacked = list(gradients.values())
        squares = {"sigma1": gradient_variance(stacked), "gradient": gradient_norm(stacked)}
        if len(stacked) > 1:
            squares["sigma2"] = gradient_distance(stacked)
            return squares, dict(zip(gradients, worker_distances(stacked), strict=True))
        if self._config.clients > 1:
            return squares, {}
        return squares | {"sigma2": Estimate(0.0, 0.0)}, dict.fromkeys(
            gradients, Estimate(0.0, 0.0)
        )

    def _secant(self, theta: Tensor, gradients: Mapping[int, Tensor]) -> Estimate | None:
        """Return the secant estimate since the last diagnostic round, by workers that answered
        both.

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
            [before[client] for client in both], [gradients[client] for client in both], distance
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the diagnostics."""
        if self._last is None:
            return {}
        theta, gradients = self._last
        return {"theta": theta} | {str(client): part for client, part in gradients.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors`."""
        parts = dict(tensors)
        theta = parts.pop("theta", None)
        self._last = None if theta is None else (theta, {int(c): part for c, part in parts.items()})


def _usual(state: _Open) -> dict[int, Answer]:
    """Return the answers without those whose loss is an outlier, as in the round's own loss."""
    answers = dict(sorted(state.answers.items()))
    if not answers:
        return {}
    losses = {client: answer.loss for client, answer in answers.items()}
    _, outliers = usual_mean(losses, state.round, "measured loss")
    for client in outliers:
        state.unanswered[client] = (
            f"what it measured is left out: a loss of {losses[client]:.4g}, over {OUTLIER:g} times "
            "the median"
        )
    return {client: answer for client, answer in answers.items() if client not in outliers}


def _largest_loss(answers: Mapping[int, Answer]) -> Estimate:
    """Return the largest F_n; workers share the spread of a minibatch's loss, of which two tell
    little.
    """
    every = answers.values()
    counts = [len(answer.gradients) for answer in every]
    variances = [answer.loss_error**2 * len(answer.gradients) for answer in every]
    return largest_of([answer.loss for answer in every], variances, counts)


def _reason(packed: Packed) -> str:
    """Return why a worker could not measure, as text for the record."""
    if packed.dtype != "uint8" or len(packed.data) > 4 * MOST_LETTERS:
        raise UpdateError(
            f"{FAILED} is {packed.dtype} of {len(packed.data)} bytes, not a text of at most "
            f"{MOST_LETTERS} letters"
        )
    return clean(bytes(packed.data).decode("utf-8", errors="replace"))


def _answer(packed: Packed, numbers: Mapping[str, Any], d: int) -> Answer:
    m = packed.shape[0] if len(packed.shape) == 2 else 0
    fits = packed.dtype == "float32" and MINIBATCHES <= m <= MOST_MINIBATCHES
    if not fits or packed.shape != (m, SKETCH) or len(packed.data) != 4 * m * SKETCH:
        raise UpdateError(
            f"{GRADIENTS} is {packed.dtype} {packed.shape} of {len(packed.data)} bytes, not "
            f"float32 (m, {SKETCH}) with m from {MINIBATCHES} to {MOST_MINIBATCHES}"
        )
    gradients = torch.from_numpy(np.frombuffer(packed.data, "<f4").reshape(m, SKETCH).astype("f8"))
    try:
        loss, error, moment = (float(numbers[key]) for key in (LOSS, LOSS_ERROR, M2))
        curved = (float(numbers[L]), float(numbers[L_ERROR])) if L in numbers else ()
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise UpdateError(f"diagnostic missing or not a number: {problem}") from problem
    # NaN fails every comparison
    legal = all(0 <= value <= MEASURED_LIMIT for value in (loss, error, moment, *curved))
    if not legal or not bool((gradients.abs() <= MEASURED_LIMIT).all()):
        raise UpdateError("diagnostics are not finite or out of range")
    if moment > d * (1 + 1e-9):
        raise UpdateError(f"{M2} = {moment:.6g} is out of range: it is at most d = {d}")
    return Answer(loss, error, moment, gradients, Estimate(*curved) if curved else None)
