"""The server's side of a round: tasks out, updates in, equation (8), the moving average.

The coordinator joins the parts: `participation` knows the clients, `policies` says who is asked and
when a round closes, `rounds` makes tasks and checks updates, `open_round` holds what is out and
what has come, `summary` writes it down. None of them knows which engine carries a message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.config import Config
from fed_diffusion.masks.recipe import RecipeError
from fed_diffusion.protocol.errors import DivergedError, Fault, UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.moments import blank, grouped, parted, stored
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.server.diagnostics import Diagnostics
from fed_diffusion.server.divergence import check_divergence
from fed_diffusion.server.norms import NormLimit, norm_factor
from fed_diffusion.server.open_round import Flights, OpenRound
from fed_diffusion.server.optimizers import ServerStep
from fed_diffusion.server.participation import Participation
from fed_diffusion.server.policies import RoundPolicy
from fed_diffusion.server.policy_of import checked, policy_of
from fed_diffusion.server.rounds import Rounds
from fed_diffusion.server.summary import Ledger
from fed_diffusion.store.ledger import RoundSummary


class BelowQuorum(RuntimeError):
    """Too few updates counted for the round to be closed; the message holds the reasons."""


class Coordinator:
    """Holds theta; hands out tasks, takes updates in any order, closes rounds by equation (8).

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.
    theta
        theta_0 by name, float32 on the CPU; copied.

    Attributes
    ----------
    round
        How many rounds are done.
    moments
        The optimiser's state behind theta, where local.state is shared; see `protocol.moments`.
    clock
        Simulated seconds since the start; only the in-process engine moves it.
    open
        The round in progress; None between rounds.
    """

    def __init__(self, run: Config | Setup, theta: Mapping[str, Tensor]):
        setup = Setup.of(run)
        self.config = config = setup.config
        self.theta = {n: v.detach().to("cpu").float().clone() for n, v in theta.items()}
        self.ema = {name: value.clone() for name, value in self.theta.items()}
        self.moments = blank(self.theta, config.local)
        self.round = 0
        self.clock = 0.0
        self.parameters = sum(value.numel() for value in self.theta.values())
        self.layout = setup.layout
        self.participation = Participation(setup)
        self.policy: RoundPolicy = policy_of(config)
        self.flights = Flights(self.policy.overlapping)
        self.step = ServerStep(config.server, self.theta)
        factor = norm_factor(config.round, config.privacy.clip is not None)
        self.norms = NormLimit(config.round.max_norm, factor)
        self.diagnostics = Diagnostics(setup)
        self.ledger = Ledger(setup, self.parameters)
        parts = self.participation, self.policy, self.norms, self.diagnostics, self.ledger
        self._rounds = Rounds(setup, *parts)
        self.open: OpenRound | None = None

    # --- what a checkpoint holds ----------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file."""
        measured = self.diagnostics.tensors()
        groups = {"theta": self.theta, "ema": self.ema} | grouped(self.moments)
        groups |= self.flights.tensors() | self.step.tensors()
        return groups | ({"diagnostic": measured} if measured else {})

    def state(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors."""
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
            Its tensors are not this model's.
        """
        self.theta, self.ema = (_as(self.theta, tensors[name]) for name in ("theta", "ema"))
        if held := stored(tensors, self.moments):  # none where the setting has been changed
            self.moments = _as(self.moments, held)
        self.step.restore(tensors)
        self.round = int(state["round"])
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
        """The clients that get a task now, of those that can be reached; None means all."""
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
        theta, moments = self.theta, self.moments
        for task, flight in self._rounds.tasks(round, theta, moments, recipes, state.masks):
            state.send(task)
            self.flights.send(task.client, flight, theta | moments)
            yield task

    def again(self, client: int) -> Task:
        """A task that is out, made anew from the theta it began on."""
        versions, began = self.flights.versions, self.flights.out[client].round
        assert versions is not None
        theta, moments = parted(versions[began])
        recipe = self._rounds.recipes(began, self.participation.eligible(), theta)[client]
        masks, recipes = self._rounds.masks(theta), {client: recipe}
        ((task, flight),) = self._rounds.tasks(began, theta, moments, recipes, masks)
        self.flights.out[client] = flight
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
            if refused.strike:
                self.participation.strike(update.client)
            state.diverged += [update.client] if refused.diverged else []
            first = refused.first if isinstance(refused, DivergedError) else None
            state.spoiled += [update.client] if self.ledger.spoiled(first) else []
            state.reject(update.client, str(error), node, 0, "node" if refused.strike else "server")
            self.flights.land(update.client)
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

        A node's fault counts against the client once the round is closed: it fails where others
        do not. Where nobody's update counts, the fault may well be ours.

        Parameters
        ----------
        nbytes
            So many bytes of the update came.
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
        """Clients that have a task and have not been heard of."""
        return sorted(self.flights.out)

    def unsent(self) -> list[int]:
        """Clients of the open round whose task has not been made yet."""
        return self._state().unsent()

    # --- the end of a round ---------------------------------------------------------------------

    def close_round(self) -> RoundSummary:
        """Equation (8), the server's step and the moving average.

        The round counts as done even if some failed.

        Raises
        ------
        BelowQuorum
            Too few updates counted; theta is as it was, and the round can be tried again.
        Diverged
            As before, but because training diverges: to try again would bring the same.
        """
        state, round = self._state(), self.round + 1
        self.open = None
        self.flights.close()
        needed = self.quorum()
        if self.config.privacy.clip is not None and self.config.round.fraction < 1:
            needed = min(needed, len(state.recipes))  # a draw of nobody is a round like any other
        if len(state.clients) < needed:
            self.ledger.give_up(state)
            self.flights.again_from(round)
            local, rounds = self.config.local, self.config.rounds
            check_divergence(local.eta, eta_of(local, rounds, round), round, needed, state)
            raise BelowQuorum(_too_few(state, round, needed))
        mean, moments = parted(state.mean.result())
        self.theta, self.moments = self.step.move(self.theta, mean, state.mean), moments
        decay = min(self.config.ema.decay, (1 + round) / (10 + round))
        for name, average in self.ema.items():
            average.lerp_(self.theta[name], 1 - decay)
        self.round = round
        for client in state.failed:
            self.participation.strike(client)
        self.norms.learn(state.norms)
        banned, theory = self.participation.banned(), self.diagnostics.close()
        return self.ledger.close(state, round, clock=self.clock, banned=banned, theory=theory)

    def _state(self) -> OpenRound:
        if self.open is None:
            raise RuntimeError("no round is open: call tasks() first")
        return self.open


def _as(model: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors in the model's order, which random masks follow; a file keeps its own."""
    shapes, theirs = ({n: tuple(v.shape) for n, v in it.items()} for it in (model, stored))
    if shapes != theirs:
        raise ValueError("the checkpoint's tensors are not those of the configured model")
    return {name: stored[name] for name in model}


def _too_few(state: OpenRound, round: int, needed: int) -> str:
    reasons = "; ".join(f"client {r['client']}: {r['reason']}" for r in state.rejected[:5])
    return (
        f"round {round}: {len(state.clients) or 'no'} update counted, and "
        f"{needed} are needed (round.quorum). {reasons or 'No reply came.'}"
    )
