"""The tasks that are out: who has one, since when, and what is needed when its update comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Update
from fed_diffusion.server.mask_store import Bits

Theta = dict[str, Tensor]
VERSION = "theta-"
"""The checkpoint's files of earlier theta are named so, with the number of their round."""


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
    """

    round: int
    recipe: Recipe
    nbytes: int
    kept: float
    w2: float
    bits: Bits | None


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
        Round -> the theta that tasks of it began on, while they are out, so that a resumed run can
        send them again; None where tasks are not sent again.
    """

    def __init__(self, overlapping: bool):
        self._overlapping = overlapping
        self.out: dict[int, Flight] = {}
        self._began: dict[int, int] = {}
        """client -> the round of its last task: one task for each version of theta."""
        self.sent_at: dict[int, float] = {}
        self.versions: dict[int, Theta] | None = {} if overlapping else None

    def free(self, clients: list[int], round: int) -> list[int]:
        """Those without a task that have not trained on the theta after `round` rounds yet."""
        return [c for c in clients if c not in self.out and self._began.get(c, 0) <= round]

    def send(self, client: int, flight: Flight, theta: Theta) -> None:
        """Note a task that is sent."""
        self.out[client] = flight
        self._began[client] = flight.round
        if self.versions is not None:
            self.versions[flight.round] = theta

    def of(self, update: Update) -> Flight:
        """The task that an update answers.

        Raises
        ------
        UpdateError
            Its client has no task, or another one.
        """
        flight = self.out.get(update.client)
        if flight is None:
            raise UpdateError("no update was expected from this client (a duplicate?)")
        if update.round != flight.round:
            raise UpdateError(
                f"it is for round {update.round}, and its task is of round {flight.round}"
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
        """Whoever was asked in this round may be asked in it again: it did not count."""
        self._began = {client: began for client, began in self._began.items() if began < round}

    def forget(self) -> None:
        """All clients are free: on real machines nobody answers for a server that is gone."""
        self.out, self._began, self.versions = {}, {}, None

    def tensors(self) -> dict[str, Theta]:
        """What a checkpoint holds of it, by file."""
        return {f"{VERSION}{round}": theta for round, theta in (self.versions or {}).items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside tensors; nothing where no task outlives a round."""
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
        """Go on from a checkpoint; what was out is out again if its theta is there, else free.

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
