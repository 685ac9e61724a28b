"""The server's side of a round: tasks out, updates in, equation (8), the moving average."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.aggregation.named import Aggregator, aggregator_of
from fed_diffusion.aggregation.private import PrivateMean, drawn
from fed_diffusion.build import channel_layout, time_grid
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.config import Config
from fed_diffusion.data import image_shape
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.mask import Masks, kept_fraction, pruning_error
from fed_diffusion.masks.plan import able, known_ratios, plan_round
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.divergence import exploded
from fed_diffusion.protocol.errors import DivergedError, LimitError, UpdateError
from fed_diffusion.protocol.messages import EXAMPLES_LIMIT, Task, Update, measurements
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.protocol.wire import (
    Payload,
    cast_theta,
    decode_bits,
    decode_update,
    encode_bits,
    encode_task,
)
from fed_diffusion.server.diagnostics import Diagnostics
from fed_diffusion.server.divergence import check_divergence, round_losses, warn_if_worse
from fed_diffusion.server.norms import NormLimit
from fed_diffusion.store.ledger import ClientRound, RoundSummary

MASK_BYTES = 64 << 20
"""Masks of a round that stay packed until their updates come, whatever the number of clients."""


@dataclass
class _Open:
    """The round in progress."""

    mean: Aggregator
    recipes: dict[int, Recipe]
    target: int
    """Updates that are enough to close the round early."""
    absent: list[int] = field(default_factory=list)
    """Clients that could not be reached when it began."""
    waiting: dict[int, int] = field(default_factory=dict)
    """client -> bytes sent to it, for those whose update is still out."""
    lost: dict[int, tuple[float, float]] = field(default_factory=dict)
    """client -> the part of all coordinates that its mask keeps, and w^2."""
    shared: dict[float, Masks] = field(default_factory=dict)
    """keep ratio -> mask, where it is the same for all clients of a round."""
    packed: dict[int, dict[str, Packed]] = field(default_factory=dict)
    """client -> its mask, where deriving it again costs ten times as much as unpacking it."""
    room: int = MASK_BYTES
    """Bytes left for `packed`."""
    clients: list[ClientRound] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    """Clients whose update did not count because their training has diverged."""
    norms: list[float] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


class BelowQuorum(RuntimeError):
    """Too few updates counted for the round to be closed; the message holds the reasons."""


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
        self.family = family_of(config.pruning, config.seed)
        self.keeps = known_ratios(config)
        self._Z = DSMLoss(time_grid(config)).Z
        self._d = math.prod(image_shape(config.data))
        self.strikes: dict[int, int] = {}
        """client -> how many bad updates it has sent."""
        self.norms = NormLimit(config.round.max_norm, config.round.norm_factor)
        self.diagnostics = Diagnostics(config)
        self._open: _Open | None = None
        self._failed: _Open | None = None
        """Earlier attempts at the same round: what they cost and why updates did not count."""
        self._late = 0
        self.losses: list[float] = []
        """Of the rounds so far: what a client's loss is compared with."""
        self._lowest: list[float] = []
        """The lowest loss or held-out loss since this process began, if any."""
        self._warned = False
        self.clock = 0.0
        """Simulated seconds since the start; only the in-process engine moves it."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file."""
        groups = {"theta": self.theta, "ema": self.ema}
        measured = self.diagnostics.tensors()
        return groups | ({"diagnostic": measured} if measured else {})

    def state(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors."""
        strikes = {str(client): count for client, count in self.strikes.items()}
        known = {"round": self.round, "strikes": strikes, "norms": self.norms.recent}
        return known | {"clock": self.clock}

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        ValueError
            Its tensors are not this model's.
        """
        theta, ema = tensors["theta"], tensors["ema"]
        for mine, theirs in ((self.theta, theta), (self.ema, ema)):
            here = {name: tuple(value.shape) for name, value in mine.items()}
            if here != {name: tuple(value.shape) for name, value in theirs.items()}:
                raise ValueError("the checkpoint's tensors are not those of the configured model")
        # in the model's order, which random masks follow; a file keeps its own
        self.theta = {name: theta[name] for name in self.theta}
        self.ema = {name: ema[name] for name in self.ema}
        self.round = int(state["round"])
        self.strikes = {int(client): int(n) for client, n in state["strikes"].items()}
        self.norms.recent = [float(norm) for norm in state["norms"]]
        self.clock = float(state["clock"])
        self.diagnostics.restore(tensors.get("diagnostic", {}))

    def announce(self, client: int, keep: float) -> None:
        """Note the keep ratio that a client's node gives it (pruning.budget: node or auto)."""
        self.keeps[client] = keep

    def eligible(self) -> list[int]:
        """Clients that may take part: not banned; under `exclusive` only with the whole network."""
        banned = self.banned()
        return [client for client in able(self.config, self.keeps) if client not in banned]

    def banned(self) -> list[int]:
        """Clients that have sent round.ban_after bad updates."""
        limit = self.config.round.ban_after
        return sorted(c for c, count in self.strikes.items() if limit and count >= limit)

    def target(self) -> int:
        """How many updates a round wants: round.fraction of the eligible clients, at least one."""
        return max(1, math.floor(self.config.round.fraction * len(self.eligible()) + 0.5))

    def quorum(self) -> int:
        """How many it needs: round.quorum, as a count or as a part of the target."""
        quorum = self.config.round.quorum
        wanted = quorum if isinstance(quorum, int) else math.ceil(quorum * self.target())
        return min(wanted, self.target())

    def participants(self, round: int, available: Collection[int] | None = None) -> list[int]:
        """The clients of a round, drawn by the run's seed: the target and round.over_select more.

        Under privacy each by chance of its own, from the operating system's entropy.

        Parameters
        ----------
        available
            Clients that can be reached; default: all.
        """
        everyone = self.eligible()
        if available is not None:
            everyone = [client for client in everyone if client in available]
        if self.config.privacy.clip is not None:
            return drawn(everyone, self.config.round.fraction)
        count = math.ceil(self.target() * (1 + self.config.round.over_select))
        if count >= len(everyone):
            return everyone
        draw = generator(self.config.seed, Purpose.PARTICIPATION, round)
        return sorted(int(c) for c in draw.choice(everyone, count, replace=False))

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        """Open the round and yield each participant's task; payloads are made one at a time."""
        keeps = {client: self.keeps[client] for client in self.participants(round, available)}
        absent = [c for c in self.eligible() if available is not None and c not in available]
        recipes = plan_round(self.config, round, keeps, self.theta, self.layout)
        if self.config.privacy.clip is None:
            self._open = _Open(self._mean(max(1, len(keeps))), recipes, self.target(), absent)
        else:
            self._open = _Open(self._mean(1), recipes, len(keeps), absent)
            self._open.mean = self._private_mean(round)
        whole = [client for client, recipe in recipes.items() if recipe.whole()]
        self.diagnostics.open(round, self.theta, whole)
        yield from self._encode(round, list(recipes))

    def _private_mean(self, round: int) -> PrivateMean:
        """Its denominators count all clients of the run, be they away or banned."""
        keeps = {client: self.keeps[client] for client in able(self.config, self.keeps)}
        recipes = plan_round(self.config, round, keeps, self.theta, self.layout)
        masks = (self._mask(recipe) for recipe in recipes.values())
        return PrivateMean(self.theta, masks, self.config.round.fraction, self.config.privacy)

    def _encode(self, round: int, clients: list[int]) -> Iterator[Task]:
        """The tasks of these clients of the open round, with theta cast once for all of them."""
        state = self._state()
        casts = cast_theta(self.theta, self.config, round)
        full: Payload | None = None
        for client in clients:
            recipe = state.recipes[client]
            if recipe.whole():  # the same bytes for everyone who trains the whole network
                full = full or encode_task(casts, recipe, {})
                asked = self.diagnostics.question(client)
                payload = Payload(full.arrays, recipe.to_metrics() | asked)
                state.lost[client] = 1.0, 0.0
            else:
                masks = self._mask(recipe)
                self._remember(state, client, recipe, masks)
                payload = encode_task(casts, recipe, masks)
                kept = kept_fraction(masks, self.theta)
                state.lost[client] = kept, pruning_error(masks, self.theta)
            state.waiting[client] = payload.nbytes
            state.bytes_down += payload.nbytes
            yield Task(round, client, payload)

    def receive(self, update: Update, node: int | None = None) -> bool:
        """Check an update and add it; a bad one is rejected whole and named in the summary."""
        state = self._state()
        state.bytes_up += update.payload.nbytes
        try:
            self._accept(state, update)
        except (UpdateError, RecipeError) as error:
            refused = error if isinstance(error, UpdateError) else UpdateError(str(error))
            if refused.strike:
                self.strikes[update.client] = self.strikes.get(update.client, 0) + 1
            state.diverged += [update.client] if refused.diverged else []
            self.reject(update.client, str(error), node)
            return False
        return True

    def reject(self, client: int, reason: str, node: int | None = None, nbytes: int = 0) -> None:
        """Note that a client's update does not count, and why; `nbytes` of it came."""
        state = self._state()
        state.bytes_up += nbytes
        state.waiting.pop(client, None)
        where = {} if node is None else {"node": str(node)}
        state.rejected.append({"client": client, "reason": reason, **where})

    def late(self) -> None:
        """Note a reply to a round that is closed; it is thrown away."""
        self._late += 1

    def enough(self) -> bool:
        """Whether a round is open and has as many updates as it wants."""
        return self._open is not None and len(self._open.clients) >= self._open.target

    def waiting(self) -> list[int]:
        """Clients of the open round that have a task and have not been heard of."""
        return list(self._state().waiting)

    def unsent(self) -> list[int]:
        """Clients of the open round whose task has not been made yet."""
        return [client for client in self._state().recipes if client not in self._state().lost]

    def _accept(self, state: _Open, update: Update) -> None:
        agreed = self._agreed(update)
        numbers = update.payload.numbers
        recipe = Recipe.from_metrics(numbers)
        if recipe != agreed:
            raise RecipeError(f"the recipe is not the one agreed on: {recipe.differences(agreed)}")
        measured = measurements(numbers)
        self._check_loss(measured["loss"])
        masks = self._mask_of(update.client, recipe)
        arrays, answer = self.diagnostics.split(update)
        values = decode_update(arrays, self.theta, masks, self.config)
        rms = self.norms.check(values, self.theta, masks)
        by_examples = self.config.round.weighting == "examples"
        weight = measured["examples"] if by_examples else 1
        if weight > EXAMPLES_LIMIT:
            raise LimitError(
                f"it trained on {weight} images, and round.weighting = examples has room for "
                f"{EXAMPLES_LIMIT} on one client: use uniform, or make several clients of it"
            )
        state.mean.add(self._damped(update.client, values, masks), masks, weight)
        self.diagnostics.add(update.client, answer)
        state.clients.append(self._client_round(state, update, recipe, measured))
        state.norms += [] if rms is None else [rms]
        del state.waiting[update.client]

    def _check_loss(self, loss: float) -> None:
        """Compared with earlier rounds alone: no verdict depends on who came first in this one.

        Not under privacy, where what one client says must not decide whether another counts.
        """
        if self.config.privacy.clip is not None:
            return
        if self.losses and exploded(loss, lowest := min(self.losses)):
            raise DivergedError(
                f"its training diverged: its loss is {loss:.4g}, and the lowest of a round was "
                f"{lowest:.4g}"
            )

    def _damped(self, client: int, values: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
        """A client's values as they are averaged; buffered rounds damp those that are stale."""
        return values

    def _agreed(self, update: Update) -> Recipe:
        """The recipe that this client was sent."""
        state = self._state()
        if update.client not in state.waiting:
            raise UpdateError("no update was expected from this client (a duplicate?)")
        if update.round != self.round + 1:
            raise UpdateError(f"it is for round {update.round}, and this is {self.round + 1}")
        return state.recipes[update.client]

    def _mask_of(self, client: int, recipe: Recipe) -> Masks:
        """The mask that a client trained under."""
        packed = self._state().packed.pop(client, None)
        return self._mask(recipe) if packed is None else decode_bits(packed, self.theta)

    def _remember(self, state: _Open, client: int, recipe: Recipe, masks: Masks) -> None:
        size = sum((math.prod(mask.shape) + 7) // 8 for mask in masks.values())
        if self.family.shrinks or self.family.shared or size > state.room:
            return
        state.packed[client] = encode_bits(masks)
        state.room -= size

    def _client_round(
        self, state: _Open, update: Update, recipe: Recipe, measured: dict[str, Any]
    ) -> ClientRound:
        kept, w2 = state.lost[update.client]
        return ClientRound(
            client=update.client,
            kind=recipe.kind,
            keep=kept,
            loss=measured["loss"],
            holdout_loss=measured.get("holdout_loss"),
            w2=w2,
            images=measured["images"],
            seconds=measured["seconds"],
            bytes_up=update.payload.nbytes,
            bytes_down=state.waiting[update.client],
            precision=measured.get("precision", "unknown"),
        )

    def close_round(self) -> RoundSummary:
        """Equation (8) and the moving average; the round counts as done even if some failed.

        Raises
        ------
        BelowQuorum
            Too few updates counted; theta is as it was, and the round can be tried again.
        Diverged
            As before, but because training diverges: to try again would bring the same.
        """
        state, round = self._state(), self.round + 1
        self._open = None
        needed = self.quorum()
        if self.config.privacy.clip is not None and self.config.round.fraction < 1:
            needed = min(needed, len(state.recipes))  # a draw of nobody is a round like any other
        if len(state.clients) < needed:
            self._give_up(state)
            check_divergence(
                self.config.local.eta, eta_of(self.config, round), round, needed, state
            )
            reasons = "; ".join(f"client {r['client']}: {r['reason']}" for r in state.rejected[:5])
            raise BelowQuorum(
                f"round {round}: {len(state.clients) or 'no'} update counted, and "
                f"{needed} are needed (round.quorum). {reasons or 'No reply came.'}"
            )
        self.theta = state.mean.result()
        self._update_ema(round)
        self.round = round
        self.norms.learn(state.norms)
        return self._summary(state, round)

    def _give_up(self, state: _Open) -> None:
        """What an attempt has cost stays in the ledger of the round."""
        before = self._failed or _Open(self._mean(1), {}, 0)
        before.bytes_up += state.bytes_up
        before.bytes_down += state.bytes_down
        before.rejected += state.rejected
        before.clients += state.clients
        before.mean = self._mean(1)
        self._failed = before

    def _mean(self, workers: int) -> Aggregator:
        return aggregator_of(self.theta, workers, self.config.round)

    def _update_ema(self, round: int) -> None:
        decay = min(self.config.ema.decay, (1 + round) / (10 + round))
        for name, average in self.ema.items():
            average.lerp_(self.theta[name], 1 - decay)

    def _summary(self, state: _Open, round: int) -> RoundSummary:
        failed, self._failed = self._failed or _Open(state.mean, {}, 0), None
        late, self._late = self._late, 0
        clients = sorted(state.clients, key=lambda c: c.client)
        rejected = failed.rejected + sorted(state.rejected, key=lambda r: r["client"])
        sent = len(clients) + len(failed.clients)
        sent += sum(entry["client"] not in state.absent for entry in rejected)
        loss, heldout, outliers = round_losses(clients, round)
        if loss is None:  # under privacy a round may be of nobody: then the last loss stands for it
            loss = self.losses[-1] if self.losses else 0.0
        else:
            self._note_losses([loss] if heldout is None else [loss, heldout], round)
            self.losses.append(loss)
        trainers = state.mean.coverage.trainers()
        gamma, w2_max = min(trainers), max((c.w2 for c in clients), default=0.0)
        return RoundSummary(
            round=round,
            loss=loss,
            holdout_loss=heldout,
            dsm_objective=loss * self._Z * self._d,
            gamma=gamma,
            trained=1 - trainers.get(0, 0) / self.parameters,
            w2_max=w2_max,
            w2_n_over_gamma=w2_max * len(clients) / gamma if gamma else None,
            bytes_up=failed.bytes_up + state.bytes_up,
            bytes_down=failed.bytes_down + state.bytes_down,
            dense_bytes=4 * self.parameters * sent,
            images=sum(c.images for c in clients),
            eta=eta_of(self.config, round),
            clients=clients,
            rejected=rejected,
            clock=self.clock if self.config.round.pace else None,
            late=late,
            banned=self.banned(),
            absent=state.absent,
            outliers=outliers,
            coverage={str(count): coordinates for count, coordinates in trainers.items()},
            theory=self.diagnostics.close(),
        )

    def _note_losses(self, now: list[float], round: int) -> None:
        """Warn once where they are far above earlier ones."""
        if not self._warned:
            self._warned = warn_if_worse(now, self._lowest, round, self.config.local.eta)
        self._lowest = [min(self._lowest + now)]

    def _mask(self, recipe: Recipe) -> Masks:
        if recipe.whole() or not self.family.shared:
            return derive(self.family, recipe, self.theta, self.layout)
        cache = self._state().shared
        if recipe.keep not in cache:
            cache[recipe.keep] = derive(self.family, recipe, self.theta, self.layout)
        return cache[recipe.keep]

    def _state(self) -> _Open:
        if self._open is None:
            raise RuntimeError("no round is open: call tasks() first")
        return self._open
