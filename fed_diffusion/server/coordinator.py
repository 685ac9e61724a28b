"""The server's side of a round: tasks out, updates in, equation (8), the moving average.

The coordinator joins the parts: `participation` knows the clients, `policies` says who is asked and
when a round closes, `rounds` makes tasks and checks updates, `open_round` holds what is out and
what has come, `summary` writes it down. None of them knows which engine carries a message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.config import Config
from fed_diffusion.masks.recipe import RecipeError
from fed_diffusion.protocol.errors import DivergedError, Fault, UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.server.diagnostics import Diagnostics
from fed_diffusion.server.divergence import check_divergence
from fed_diffusion.server.model import Model
from fed_diffusion.server.norms import limit_of
from fed_diffusion.server.open_round import Flights, OpenRound
from fed_diffusion.server.participation import Participation
from fed_diffusion.server.policies import RoundPolicy
from fed_diffusion.server.policy_of import checked, policy_of
from fed_diffusion.server.rounds import Rounds
from fed_diffusion.server.summary import Ledger
from fed_diffusion.store.ledger import RoundSummary


class BelowQuorum(RuntimeError):
    """Too few updates counted for the round to be closed; the message holds the reasons."""


class Coordinator(Model):
    """Holds theta; hands out tasks, takes updates in any order, closes rounds by equation (8).

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.
    theta
        theta_0 by name, float32 on the CPU; copied.

    Attributes
    ----------
    clock
        Simulated seconds since the start; only the in-process engine moves it.
    open
        The round in progress; None between rounds.
    """

    def __init__(self, run: Config | Setup, theta: Mapping[str, Tensor]):
        setup = Setup.of(run)
        super().__init__(setup.config, theta)
        self.clock, self.layout = 0.0, setup.layout
        self.participation = Participation(setup)
        self.policy: RoundPolicy = policy_of(self.config)
        self.flights = Flights(self.policy.overlapping)
        self.norms = limit_of(self.config.round, self.config.privacy)
        self.diagnostics = Diagnostics(setup)
        self.ledger = Ledger(setup, self.parameters)
        parts = self.participation, self.policy, self.norms, self.diagnostics, self.ledger
        self._rounds = Rounds(setup, *parts)
        self.open: OpenRound | None = None

    # --- what a checkpoint holds ----------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds, by file."""
        measured = self.diagnostics.tensors()
        groups = super().tensors() | self.flights.tensors()
        return groups | ({"diagnostic": measured} if measured else {})

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the tensors."""
        strikes, norms = self.participation.state(), self.norms.recent
        known = {"round": self.round, "strikes": strikes, "norms": norms, "clock": self.clock}
        return known | self.flights.state()

    def restore(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        ValueError
            The checkpoint's tensors are not this model's.
        """
        self.put_back(tensors, int(state["round"]))
        self.participation.restore(state["strikes"])
        self.norms.recent = [float(norm) for norm in state["norms"]]
        self.clock = float(state["clock"])
        self.flights.restore(tensors, state, [*self.theta, *self.moments])
        self.diagnostics.restore(tensors.get("diagnostic", {}))

    # --- who takes part -------------------------------------------------------------------------

    def target(self) -> int:
        """How many updates a round wants, where every eligible client can be reached."""
        return self.policy.target(len(self.participation.eligible()))

    def quorum(self) -> int:
        """How many updates a round needs."""
        return self.policy.quorum(len(self.participation.eligible()))

    def participants(self, round: int, available: Collection[int] | None = None) -> list[int]:
        """Return the clients that get a task now, of those that can be reached; None means all."""
        eligible = self.participation.eligible()
        here = [client for client in eligible if available is None or client in available]
        free = self.flights.free(here, self.round)
        return checked(self.policy.ask(round, free, len(eligible)), free)

    # --- tasks out ------------------------------------------------------------------------------

    def tasks(self, round: int, available: Collection[int] | None = None) -> Iterator[Task]:
        """Yield the task of each client that is asked now; payloads are made one at a time.

        The first call opens the round. Where tasks outlive rounds, later calls go on with it, and
        ask who has become free; else a call begins the round anew.
        """
        if not self.policy.overlapping:
            self.flights.forget()
            self.open = None
        asked = self.participants(round, available)
        if self.open is None:
            self.open = self._rounds.begin(round, self.theta, self.moments, asked, available)
            whole = [c for c, recipe in self.open.recipes.items() if recipe.whole()]
            self.diagnostics.open(round, self.theta, whole)
        state = self.open
        recipes = {client: state.recipes[client] for client in asked if client in state.recipes}
        made = self._rounds.tasks(round, self.theta, self.moments, recipes, state.masks)
        for task, flight in made:
            state.send(task)
            self.flights.send(task.client, flight, self.theta | self.moments)
            yield task

    def again(self, client: int) -> Task:
        """Return a task that is out, made anew from the theta that it began on."""
        versions, began = self.flights.versions, self.flights.out[client].round
        assert versions is not None
        task, self.flights.out[client] = self._rounds.again(began, client, versions[began])
        return task

    # --- updates in -----------------------------------------------------------------------------

    def receive(self, update: Update, node: int | None = None) -> bool:
        """Check an update and add it; a bad one is rejected whole and named in the summary."""
        state = self._state()
        state.bytes_up += update.payload.nbytes
        try:
            flight = self.flights.of(update)
            state.asked.add(update.client)
            stale = self.round + 1 - flight.round
            self._rounds.take(state, flight, update, self.theta, self.moments, stale, node)
        except (UpdateError, RecipeError) as error:
            refused = error if isinstance(error, UpdateError) else UpdateError(str(error))
            _refuse(self, state, update.client, refused, node)
            return False
        self.flights.land(update.client)
        return True

    def reject(
        self,
        client: int,
        reason: str,
        node: int | None = None,
        nbytes: int = 0,
        fault: Fault = "server",
    ) -> None:
        """Note that a client's update does not count, why, and whose fault it is.

        A node's fault counts against the client once the round is closed, if other clients' updates
        counted. If no client's update counted, the fault may well be the server's.

        Parameters
        ----------
        nbytes
            How many bytes of the update came.
        """
        state = self._state()
        state.failed += [client] if fault == "node" and client in self.flights.out else []
        state.reject(client, reason, node, nbytes, fault)
        self.flights.land(client)

    def note_refused(self, nodes: list[dict[str, str]]) -> None:
        """Note the nodes that are there and cannot be used, for the line of the round."""
        self._state().refused = nodes

    def enough(self) -> bool:
        """Whether a round is open and has as many updates as it wants."""
        return self.open is not None and self.open.enough()

    def waiting(self) -> list[int]:
        """Return clients that have a task and have not been heard of."""
        return sorted(self.flights.out)

    def unsent(self) -> list[int]:
        """Clients of the open round whose task has not been made yet."""
        return self._state().unsent()

    # --- the end of a round ---------------------------------------------------------------------

    def close_round(self) -> RoundSummary:
        """Close the round by equation (8), the server's step and the moving average.

        The round counts as done even if some clients failed.

        Raises
        ------
        BelowQuorum
            Too few updates counted; theta is as it was, and the round can be tried again.
        Diverged
            Too few updates counted because training diverges; another try would end the same way.
        """
        state, round = self._state(), self.round + 1
        self.open = None
        self.flights.close()
        needed = _needed(self, state)
        if len(state.clients) < needed:
            _give_up(self, state, round, needed)
        self.move(state.mean)
        for client in state.failed:
            self.participation.strike(client)
        self.norms.learn(state.norms)
        banned, theory = self.participation.banned(), self.diagnostics.close()
        return self.ledger.close(state, round, clock=self.clock, banned=banned, theory=theory)

    def _state(self) -> OpenRound:
        if self.open is None:
            raise RuntimeError("no round is open: call tasks() first")
        return self.open


def _refuse(
    coordinator: Coordinator, state: OpenRound, client: int, error: UpdateError, node: int | None
) -> None:
    """Note an update that must not count, and whose fault that is."""
    if error.strike:
        coordinator.participation.strike(client)
    state.diverged += [client] if error.diverged else []
    first = error.first if isinstance(error, DivergedError) else None
    state.spoiled += [client] if coordinator.ledger.spoiled(first) else []
    state.reject(client, str(error), node, 0, "node" if error.strike else "server")
    coordinator.flights.land(client)


def _needed(coordinator: Coordinator, state: OpenRound) -> int:
    """How many updates the open round needs."""
    config, needed = coordinator.config, coordinator.quorum()
    if config.privacy.clip is not None and config.round.fraction < 1:
        return min(needed, len(state.recipes))  # a draw of nobody is a round like any other
    return needed


def _give_up(coordinator: Coordinator, state: OpenRound, round: int, needed: int) -> NoReturn:
    """End a try of a round that too few updates counted in."""
    coordinator.ledger.give_up(state)
    coordinator.flights.again_from(round)
    local, rounds = coordinator.config.local, coordinator.config.rounds
    check_divergence(local.eta, eta_of(local, rounds, round), round, needed, state)
    raise BelowQuorum(_too_few(state, round, needed))


def _too_few(state: OpenRound, round: int, needed: int) -> str:
    reasons = "; ".join(f"client {r['client']}: {r['reason']}" for r in state.rejected[:5])
    return (
        f"round {round}: {len(state.clients) or 'no'} update counted, and "
        f"{needed} are needed (round.quorum). {reasons or 'No reply came.'}"
    )
