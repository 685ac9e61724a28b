"""The round in progress: who was asked under which recipe, what came, and what did not count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.server.flights import Flight
from fed_diffusion.server.mask_store import MaskStore
from fed_diffusion.store.ledger import ClientRound


@dataclass
class OpenRound:
    """What is known of the round in progress.

    Attributes
    ----------
    mean
        The running sums of equation (8).
    recipes
        Client -> the recipe of its mask, for all that may be asked in this round.
    target
        Updates that are enough to close the round.
    absent
        Clients that could not be reached when it began.
    asked
        Clients that were sent a task, or whose update has come.
    diverged
        Clients whose update did not count because their training has diverged.
    norms
        Root-mean-square differences of the updates, where their size is limited.
    staleness
        How often theta changed, at most, while a worker of this round trained.
    """

    mean: MaskedMean
    recipes: dict[int, Recipe]
    masks: MaskStore
    target: int
    absent: list[int]
    asked: set[int] = field(default_factory=set)
    clients: list[ClientRound] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    staleness: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def enough(self) -> bool:
        """Whether it has as many updates as it wants."""
        return len(self.clients) >= self.target

    def unsent(self) -> list[int]:
        """Clients whose task has not been made yet."""
        return [client for client in self.recipes if client not in self.asked]

    def send(self, task: Task) -> None:
        """Note a task that is sent."""
        self.asked.add(task.client)
        self.bytes_down += task.payload.nbytes

    def count(self, flight: Flight, update: Update, measured: dict[str, Any], stale: int) -> None:
        """Note an update that has been added to the mean."""
        self.staleness = max(self.staleness, stale)
        self.clients.append(
            ClientRound(
                client=update.client,
                kind=flight.recipe.kind,
                keep=flight.kept,
                loss=measured["loss"],
                holdout_loss=measured.get("holdout_loss"),
                w2=flight.w2,
                images=measured["images"],
                seconds=measured["seconds"],
                bytes_up=update.payload.nbytes,
                bytes_down=flight.nbytes,
                precision=measured.get("precision", "unknown"),
            )
        )

    def reject(self, client: int, reason: str, node: int | None, nbytes: int) -> None:
        """Note that a client's update does not count, and why; `nbytes` of it came."""
        self.bytes_up += nbytes
        where = {} if node is None else {"node": str(node)}
        self.rejected.append({"client": client, "reason": reason, **where})
