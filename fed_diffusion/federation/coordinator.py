"""The server's side of a round: tasks out, updates in, equation (8), the moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.data import image_shape
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.federation.aggregate import MaskedMean, UpdateError
from fed_diffusion.federation.wire import Payload, cast_theta, decode_update, encode_task
from fed_diffusion.masks.plan import known_ratios, plan_round
from fed_diffusion.masks.recipes import (
    Masks,
    Recipe,
    RecipeError,
    kept_fraction,
    pruning_error,
)
from fed_diffusion.models.build import channel_layout
from fed_diffusion.rng import Purpose, generator

MEASURED_LIMIT = 2.0**53
"""Above any loss, time or count that a worker can have measured."""
EXAMPLES_LIMIT = 2**24
"""Above any number of images on one client; as a weight it must leave room for its values."""


@dataclass(frozen=True)
class Task:
    """One client's work in one round, as it travels."""

    round: int
    client: int
    payload: Payload


@dataclass(frozen=True)
class Update:
    """What one client sends back: kept values; the recipe and its measurements as numbers."""

    round: int
    client: int
    payload: Payload


@dataclass(frozen=True)
class ClientRound:
    """One client's line in a round's record."""

    client: int
    kind: str
    keep: float
    loss: float
    holdout_loss: float | None
    w2: float
    images: int
    seconds: float
    bytes_up: int
    bytes_down: int


@dataclass
class RoundSummary:
    """What is known of a finished round; a line of metrics.jsonl."""

    round: int
    loss: float
    holdout_loss: float | None
    dsm_objective: float
    gamma: int
    trained: float
    w2_max: float
    w2_n_over_gamma: float | None
    """w^2 N / Gamma_r, as it stands in the bound; None where Gamma_r is 0."""
    bytes_up: int
    bytes_down: int
    dense_bytes: int
    images: int
    eta: float
    clients: list[ClientRound]
    rejected: list[dict[str, Any]]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Open:
    """The round in progress."""

    mean: MaskedMean
    recipes: dict[int, Recipe]
    waiting: dict[int, int] = field(default_factory=dict)
    """client -> bytes sent to it, for those whose update is still out."""
    top_k: dict[float, Masks] = field(default_factory=dict)
    """keep ratio -> mask: the same for all clients of a round."""
    clients: list[ClientRound] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


class Coordinator:
    """Holds theta; hands out tasks, takes updates in any order, closes rounds by equation (8).

    Parameters
    ----------
    config
        The run.
    theta
        theta_0 by name, float32 on the CPU; copied.
    """

    def __init__(self, config: Config, theta: Mapping[str, Tensor]):
        self.config = config
        self.theta = {n: v.detach().to("cpu", torch.float32).clone() for n, v in theta.items()}
        self.ema = {name: value.clone() for name, value in self.theta.items()}
        self.round = 0
        self.parameters = sum(value.numel() for value in self.theta.values())
        self.layout = channel_layout(config)
        self.keeps = known_ratios(config)
        diffusion = config.diffusion
        u = PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K)
        self._Z = DSMLoss(u).Z
        self._d = math.prod(image_shape(config.data))
        self._open: _Open | None = None

    def announce(self, client: int, keep: float) -> None:
        """Note the keep ratio that a client's node gives it (pruning.budget: node or auto)."""
        self.keeps[client] = keep

    def participants(self, round: int) -> list[int]:
        """The clients of a round: a fraction of all (at least one), drawn by the run's seed.

        Under the baseline `exclusive` only workers with the whole network count.
        """
        everyone = sorted(self.keeps)
        if self.config.pruning.baseline == "exclusive":
            everyone = [client for client in everyone if self.keeps[client] == 1]
        count = max(1, math.floor(self.config.round.fraction * len(everyone) + 0.5))
        if count == len(everyone):
            return everyone
        draw = generator(self.config.seed, Purpose.PARTICIPATION, round)
        return sorted(int(c) for c in draw.choice(everyone, count, replace=False))

    def tasks(self, round: int) -> Iterator[Task]:
        """Open the round and yield each participant's task; payloads are made one at a time."""
        keeps = {client: self.keeps[client] for client in self.participants(round)}
        recipes = plan_round(self.config, round, keeps, self.theta, self.layout)
        self._open = _Open(MaskedMean(self.theta, workers=len(keeps)), recipes)
        casts = cast_theta(self.theta, self.config, round)
        full: Payload | None = None
        for client, recipe in recipes.items():
            if recipe.kind == "full":  # the same bytes for everyone who trains the whole network
                full = full or encode_task(casts, recipe, {})
                payload = Payload(full.arrays, recipe.to_metrics())
            else:
                payload = encode_task(casts, recipe, self._mask(recipe))
            self._open.waiting[client] = payload.nbytes
            self._open.bytes_down += payload.nbytes
            yield Task(round, client, payload)

    def receive(self, update: Update) -> bool:
        """Check an update and add it; a bad one is rejected whole and named in the summary."""
        state = self._state()
        state.bytes_up += update.payload.nbytes
        try:
            self._accept(state, update)
        except (UpdateError, RecipeError) as error:
            self.reject(update.client, str(error))
            return False
        return True

    def reject(self, client: int, reason: str) -> None:
        """Note that a client's update does not count, and why."""
        state = self._state()
        state.waiting.pop(client, None)
        state.rejected.append({"client": client, "reason": reason})

    def waiting(self) -> list[int]:
        """Clients of the open round that have not been heard of."""
        return list(self._state().waiting)

    def _accept(self, state: _Open, update: Update) -> None:
        if update.client not in state.waiting:
            raise UpdateError("no update was expected from this client (a duplicate?)")
        if update.round != self.round + 1:
            raise UpdateError(f"it is for round {update.round}, and this is {self.round + 1}")
        numbers = update.payload.numbers
        recipe, agreed = Recipe.from_metrics(numbers), state.recipes[update.client]
        if recipe != agreed:
            raise RecipeError(f"the recipe is not the one agreed on: {recipe.differences(agreed)}")
        masks = self._mask(recipe)
        values = decode_update(update.payload.arrays, self.theta, masks, self.config)
        measured = _measurements(numbers)
        by_examples = self.config.round.weighting == "examples"
        state.mean.add(values, masks, measured["examples"] if by_examples else 1)
        state.clients.append(self._client_round(state, update, recipe, masks, measured))
        del state.waiting[update.client]

    def _client_round(
        self, state: _Open, update: Update, recipe: Recipe, masks: Masks, measured: dict[str, Any]
    ) -> ClientRound:
        return ClientRound(
            client=update.client,
            kind=recipe.kind,
            keep=kept_fraction(masks, self.theta),
            loss=measured["loss"],
            holdout_loss=measured.get("holdout_loss"),
            w2=pruning_error(masks, self.theta),
            images=measured["images"],
            seconds=measured["seconds"],
            bytes_up=update.payload.nbytes,
            bytes_down=state.waiting[update.client],
        )

    def close_round(self) -> RoundSummary:
        """Equation (8) and the moving average; the round counts as done even if some failed.

        Raises
        ------
        RuntimeError
            Not one update counted; the message holds the reasons.
        """
        state, round = self._state(), self.round + 1
        if not state.clients:
            reasons = "; ".join(f"client {r['client']}: {r['reason']}" for r in state.rejected)
            raise RuntimeError(f"round {round}: no update counted. {reasons or 'No reply came.'}")
        self.theta = state.mean.result()
        self._update_ema(round)
        self.round = round
        self._open = None
        return self._summary(state, round)

    def _update_ema(self, round: int) -> None:
        decay = min(self.config.ema.decay, (1 + round) / (10 + round))
        for name, average in self.ema.items():
            average.lerp_(self.theta[name], 1 - decay)

    def _summary(self, state: _Open, round: int) -> RoundSummary:
        clients = sorted(state.clients, key=lambda c: c.client)
        loss = sum(c.loss for c in clients) / len(clients)
        # Only workers with the whole network measure theta_r itself on their held-out images.
        heldout = [
            c.holdout_loss for c in clients if c.kind == "full" and c.holdout_loss is not None
        ]
        gamma, w2_max = state.mean.gamma(), max(c.w2 for c in clients)
        return RoundSummary(
            round=round,
            loss=loss,
            holdout_loss=sum(heldout) / len(heldout) if heldout else None,
            dsm_objective=loss * self._Z * self._d,
            gamma=gamma,
            trained=state.mean.trained(),
            w2_max=w2_max,
            w2_n_over_gamma=w2_max * len(clients) / gamma if gamma else None,
            bytes_up=state.bytes_up,
            bytes_down=state.bytes_down,
            dense_bytes=4 * self.parameters * (len(clients) + len(state.rejected)),
            images=sum(c.images for c in clients),
            eta=eta_of(self.config, round),
            clients=clients,
            rejected=sorted(state.rejected, key=lambda r: r["client"]),
        )

    def _mask(self, recipe: Recipe) -> Masks:
        if recipe.kind != "topk":
            return recipe.mask(self.theta, self.layout)
        cache = self._state().top_k
        if recipe.keep not in cache:
            cache[recipe.keep] = recipe.mask(self.theta)
        return cache[recipe.keep]

    def _state(self) -> _Open:
        if self._open is None:
            raise RuntimeError("no round is open: call tasks() first")
        return self._open


def eta_of(config: Config, round: int) -> float:
    """The step size of a round (1-based): linear warm-up, then constant or cosine to 0."""
    local = config.local
    eta = local.eta * min(1.0, round / (local.warmup + 1))
    if local.schedule == "cosine":
        eta *= 0.5 * (1 + math.cos(math.pi * (round - 1) / config.rounds))
    return eta


def _measurements(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's measurements, checked: they end in the record of the run."""
    try:
        measured: dict[str, Any] = {
            "loss": float(numbers["loss"]),
            "images": int(numbers["images"]),
            "examples": int(numbers["examples"]),
            "seconds": float(numbers["seconds"]),
        }
        if "holdout_loss" in numbers:
            measured["holdout_loss"] = float(numbers["holdout_loss"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UpdateError(f"measurement missing or not a number: {error}") from error
    # NaN fails every comparison; a limit on each keeps one client from owning the sums
    legal = all(0 <= value <= MEASURED_LIMIT for value in measured.values())
    if not legal or not 1 <= measured["examples"] <= EXAMPLES_LIMIT:
        raise UpdateError(f"measurements are not finite or out of range: {measured}")
    return measured
