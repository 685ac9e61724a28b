"""The round in progress: the tasks that are out, their updates, and what did not count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fed_diffusion.aggregation.named import Aggregator
from fed_diffusion.common.text import clean
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.errors import Fault, UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.server.gap import Gap
from fed_diffusion.server.mask_store import Bits, MaskStore
from fed_diffusion.store.ledger import ClientRound

Theta = dict[str, Tensor]
VERSION = "theta-"
"""The prefix of a checkpoint's files of earlier theta; the number of their round follows."""


@dataclass(frozen=True)
class Flight:
    """A task that is out: on which theta it began, and what is known of its mask.

    Attributes
    ----------
    round
        The round that it was sent in.
    nbytes
        The bytes of the task as it was sent.
    kept, w2
        The part of all coordinates that its mask keeps, and w^2 of Assumption 4.2.
    bits
        What `MaskStore.pack` has kept of the mask.
    steps
        The steps behind the moments that it began with, where local.state is shared.
    """

    round: int
    recipe: Recipe
    nbytes: int
    kept: float
    w2: float
    bits: Bits | None
    steps: Theta = field(default_factory=dict)
    most: int = 0
    """The most bytes that the answer to the task can have."""


@dataclass
class OpenRound:
    """What is known of the round in progress.

    Attributes
    ----------
    mean
        The running sums of equation (8).
    recipes
        Client -> the recipe of its mask, for all that may be asked in this round.
    gap
        What averaging an adapter's factors apart loses.
    target
        Updates that are enough to close the round.
    absent
        Clients that could not be reached when the round began.
    asked
        Clients that were sent a task, or whose update has come.
    refused
        Nodes that were there and could not be used: `node` and `reason`.
    failed
        Clients whose node sent no update in answer to their task, by the node's fault.
    diverged
        Clients whose update did not count because their training has diverged.
    spoiled
        Those diverged clients that found theta worthless before their first step.
    norms
        Root-mean-square differences of the updates, where their size is limited.
    staleness
        How often theta changed, at most, while a worker of this round trained.
    counting
        Whether the answers that come now are updates, and not other parts of a protocol.
    withheld
        Under secure aggregation: how many coordinates that somebody trained stay hidden.
    """

    mean: Aggregator
    recipes: dict[int, Recipe]
    masks: MaskStore
    gap: Gap
    target: int
    absent: list[int]
    asked: set[int] = field(default_factory=set)
    clients: list[ClientRound] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    spoiled: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    staleness: int = 0
    counting: bool = True
    withheld: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    def enough(self) -> bool:
        """Whether the round has as many updates as it wants."""
        return len(self.clients) >= self.target

    def unsent(self) -> list[int]:
        """Clients whose task has not been made yet."""
        return [client for client in self.recipes if client not in self.asked]

    def send(self, task: Task) -> None:
        """Note a task that is sent."""
        self.asked.add(task.client)
        self.bytes_down += task.payload.nbytes

    def count(
        self,
        flight: Flight,
        update: Update,
        measured: dict[str, Any],
        stale: int,
        node: int | None,
    ) -> None:
        """Note an update that has been added to the mean, and which node has sent it."""
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
                weight=measured["weight"],
                precision=measured.get("precision", "unknown"),
                node=None if node is None else str(node),
            )
        )

    def reject(self, client: int, reason: str, node: int | None, nbytes: int, fault: Fault) -> None:
        """Note that a client's update does not count, and why; `nbytes` of it came."""
        self.bytes_up += nbytes
        where = {} if node is None else {"node": str(node)}
        entry = {"client": client, "reason": clean(reason), "fault": fault, **where}
        self.rejected.append(entry)


class Flights:
    """The tasks that are out, by client.

    Parameters
    ----------
    overlapping
        Whether tasks outlive their round; see `RoundPolicy`.

    Attributes
    ----------
    sent_at
        Client -> when its task was sent, on the simulated clock; the in-process engine notes it.
    versions
        Round -> the theta that tasks of it began on, with the optimiser's state where that is
        shared, while they are out, so that a resumed run can send them again; None where tasks are
        not sent again.
    """

    def __init__(self, overlapping: bool):
        self._overlapping = overlapping
        self.out: dict[int, Flight] = {}
        self._began: dict[int, int] = {}
        """Client -> the round of its last task: each client gets one task for each version of
        theta.
        """
        self.sent_at: dict[int, float] = {}
        self.versions: dict[int, Theta] | None = {} if overlapping else None

    def free(self, clients: list[int], round: int) -> list[int]:
        """Return clients without a task that have not trained on the theta after `round` rounds
        yet.
        """
        return [c for c in clients if c not in self.out and self._began.get(c, 0) <= round]

    def send(self, client: int, flight: Flight, theta: Theta) -> None:
        """Note a task that is sent."""
        self.out[client] = flight
        self._began[client] = flight.round
        if self.versions is not None:
            self.versions[flight.round] = theta

    def of(self, update: Update) -> Flight:
        """Return the task that an update answers.

        Raises
        ------
        UpdateError
            The client has no task, or has another task.
        """
        flight = self.out.get(update.client)
        if flight is None:
            raise UpdateError("no update was expected from this client (a duplicate?)")
        if update.round != flight.round:
            raise UpdateError(
                f"it is for round {update.round}, but the client's task is of round {flight.round}"
            )
        return flight

    def land(self, client: int) -> None:
        """Note that a client's task is over."""
        self.out.pop(client, None)

    def close(self) -> None:
        """Note the end of a round: tasks that do not outlive it are over."""
        if not self._overlapping:
            self.forget()
        elif self.versions is not None:
            begun = {flight.round for flight in self.out.values()}
            self.versions = {r: theta for r, theta in self.versions.items() if r in begun}

    def again_from(self, round: int) -> None:
        """Allow clients that were asked in this round to be asked again: the round did not
        count.
        """
        self._began = {client: began for client, began in self._began.items() if began < round}

    def forget(self) -> None:
        """Free all clients: on real machines nobody answers a server that has ended."""
        self.out, self._began, self.versions = {}, {}, None

    def tensors(self) -> dict[str, Theta]:
        """Return what a checkpoint holds of the tasks, by file."""
        return {f"{VERSION}{round}": theta for round, theta in (self.versions or {}).items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside tensors; nothing where no task outlives a round."""
        if not self._overlapping:
            return {}
        return {
            "flights": {client: flight.round for client, flight in self.out.items()},
            "began": {str(client): round for client, round in self._began.items()},
            "sent_at": {str(client): self.sent_at.get(client, 0.0) for client in self.out},
        }

    def restore(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        names: list[str],
    ) -> None:
        """Go on from a checkpoint; a task is out again if its theta is there, else its client is
        free.

        Parameters
        ----------
        names
            The parameters in the model's order; a file has its own.
        """
        if not self._overlapping:
            return
        self.versions = {
            int(file.removeprefix(VERSION)): {name: theta[name] for name in names}
            for file, theta in tensors.items()
            if file.startswith(VERSION)
        }
        self._began = {int(client): round for client, round in state["began"].items()}
        self.sent_at = {int(client): float(when) for client, when in state["sent_at"].items()}
        for client, round in state["flights"].items():
            if round in self.versions:
                blank = Recipe(round=round, client=int(client))
                self.out[int(client)] = Flight(round, blank, 0, 1.0, 0.0, None)
