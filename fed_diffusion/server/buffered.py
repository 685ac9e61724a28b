"""Buffered asynchronous rounds (FedBuff) with masks: fast workers do not wait for slow ones.

The server updates theta whenever `round.buffer` updates are in. A worker gets the newest theta as
soon as it is free and theta has changed since its last task. With Delta_k the difference that
worker k made, and s_k how many times theta changed while it trained,

    theta^i <- theta^i + (1 / |N^i|) sum over N^i of Delta_k^i / (1 + s_k)^a,

where N^i are the workers of the buffer that trained coordinate i. As in FedBuff (Nguyen et al.
2022) the sum is divided by the number of updates, not by the sum of their factors, so that an
update that stands alone is damped too. With round.weighting: examples each update counts as often,
above and below, as its worker has images.
With a buffer of all workers nobody is ever stale, and this is the synchronous round, to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.mask import Masks, kept_values
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import decode_bits, encode_bits
from fed_diffusion.server.coordinator import Coordinator, _Open
from fed_diffusion.store.ledger import RoundSummary


@dataclass(frozen=True)
class Flight:
    """A task that is out: on which theta it began, and what is known of its mask."""

    round: int
    recipe: Recipe
    nbytes: int
    lost: tuple[float, float]
    bits: dict[str, Packed] | None
    """The packed mask, where it cannot be derived again once theta has changed."""


class BufferedCoordinator(Coordinator):
    """A coordinator whose rounds are updates of theta by the first `round.buffer` workers."""

    def __init__(self, config: Config, theta: Mapping[str, Tensor]):
        super().__init__(config, theta)
        self.flights: dict[int, Flight] = {}
        self._began: dict[int, int] = {}
        """client -> the round of its last task: one task for each version of theta."""
        self._staleness: list[int] = []
        self.sent_at: dict[int, float] = {}
        """client -> when its task was sent, on the simulated clock."""
        self.versions: dict[int, dict[str, Tensor]] | None = {}
        """round -> the theta that tasks of it began on, while they are out, so that a resumed run
        can send them again; None where that is not wanted."""

    def target(self) -> int:
        return min(self.config.round.buffer or len(self.eligible()), len(self.eligible()))

    def quorum(self) -> int:
        return self.target()

    def free(self, available: Collection[int] | None = None) -> list[int]:
        """Clients that have no task and have not trained on this theta yet."""
        return [
            client
            for client in self.eligible()
            if client not in self.flights
            and self._began.get(client, 0) <= self.round
            and (available is None or client in available)
        ]

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        """A task on the newest theta for every client that is free."""
        free = self.free(available)
        if self._open is None:
            keeps = {client: self.keeps[client] for client in self.eligible()}
            recipes = plan_round(self.config, round, keeps, self.theta, self.layout)
            absent = [c for c in keeps if available is not None and c not in available]
            self._open = _Open(self._mean(self.target()), recipes, self.target(), absent)
        state = self._open
        for task in self._encode(round, [client for client in free if client in state.recipes]):
            self._note_flight(task)
            self._began[task.client] = round
            if self.versions is not None:
                self.versions[round] = self.theta
            yield task

    def _note_flight(self, task: Task) -> None:
        state = self._state()
        recipe, lost = state.recipes[task.client], state.lost[task.client]
        bits = encode_bits(self._mask(recipe)) if recipe.needs_bits else None
        self.flights[task.client] = Flight(task.round, recipe, task.payload.nbytes, lost, bits)

    def again(self, client: int) -> Task:
        """A task that is out, made anew from the theta it began on."""
        assert self.versions is not None
        flight, newest, state = self.flights[client], self.theta, self._open
        keeps = {client: self.keeps[client] for client in self.eligible()}
        self.theta = self.versions[flight.round]
        try:
            recipes = plan_round(self.config, flight.round, keeps, self.theta, self.layout)
            self._open = _Open(self._mean(1), recipes, 1)
            (task,) = self._encode(flight.round, [client])
            self._note_flight(task)
        finally:
            self.theta, self._open = newest, state
        return task

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        versions = self.versions or {}
        return super().tensors() | {f"theta-{round}": v for round, v in versions.items()}

    def state(self) -> dict[str, Any]:
        flights = {client: flight.round for client, flight in self.flights.items()}
        began = {str(client): round for client, round in self._began.items()}
        sent = {str(client): self.sent_at.get(client, 0.0) for client in self.flights}
        return super().state() | {"flights": flights, "began": began, "sent_at": sent}

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Go on from a checkpoint; what was out is out again if its theta is there, else free."""
        super().restore(tensors, state)
        versions = {
            int(name.removeprefix("theta-")): {n: group[n] for n in self.theta}
            for name, group in tensors.items()
            if name.startswith("theta-")
        }
        self.versions = versions
        self._began = {int(client): round for client, round in state["began"].items()}
        self.sent_at = {int(client): float(when) for client, when in state["sent_at"].items()}
        for client, round in state["flights"].items():
            if round in versions:
                blank = Recipe(round=round, client=int(client))
                self.flights[int(client)] = Flight(round, blank, 0, (1.0, 0.0), None)

    def forget_flights(self) -> None:
        """On real machines nobody answers for a server that is gone: all are free again."""
        self.flights, self._began, self.versions = {}, {}, None

    def _agreed(self, update: Update) -> Recipe:
        flight = self.flights.get(update.client)
        if flight is None:
            raise UpdateError("no update was expected from this client (a duplicate?)")
        if update.round != flight.round:
            raise UpdateError(f"it is for round {update.round}, and its task was {flight.round}")
        state = self._state()
        state.waiting[update.client] = flight.nbytes
        state.lost[update.client] = flight.lost
        self._staleness.append(self._stale(flight))
        return flight.recipe

    def _stale(self, flight: Flight) -> int:
        return self.round + 1 - flight.round

    def _damped(self, client: int, values: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
        """theta + Delta / (1 + s)^a; the very same values where nothing is stale."""
        factor = (1 + self._stale(self.flights[client])) ** -self.config.round.staleness
        if factor == 1:
            return values
        kept = kept_values(self.theta, masks)
        return {name: kept[name] + (value - kept[name]) * factor for name, value in values.items()}

    def _mask_of(self, client: int, recipe: Recipe) -> Masks:
        bits = self.flights[client].bits
        if bits is not None:
            return decode_bits(bits, self.theta)
        return derive(self.family, recipe, self.theta, self.layout)

    def receive(self, update: Update, node: int | None = None) -> bool:
        """Check an update and add it, damped by its staleness."""
        counted = super().receive(update, node)
        self.flights.pop(update.client, None)
        return counted

    def reject(self, client: int, reason: str, node: int | None = None, nbytes: int = 0) -> None:
        super().reject(client, reason, node, nbytes)
        self.flights.pop(client, None)

    def waiting(self) -> list[int]:
        return sorted(self.flights)

    def close_round(self) -> RoundSummary:
        """Move theta by the buffered differences; tasks that are out stay out."""
        stale, self._staleness = self._staleness, []
        summary = super().close_round()
        summary.staleness = max(stale, default=0)
        if self.versions is not None:
            out = {flight.round for flight in self.flights.values()}
            self.versions = {r: theta for r, theta in self.versions.items() if r in out}
        return summary
