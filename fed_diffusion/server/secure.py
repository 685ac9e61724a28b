"""An attempt at a round under secure aggregation: its four exchanges, and the sum at their end."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import Tensor

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.named import heaviest_of
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.aggregation.stateful import StatefulMean
from fed_diffusion.build import Setup
from fed_diffusion.common.text import clean
from fed_diffusion.config import Config
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.protocol.errors import DivergedError, Fault, UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import BESIDE
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.gathering import Gathering
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.opening import Unopened
from fed_diffusion.secure.plan import PlanError
from fed_diffusion.secure.words import means_of
from fed_diffusion.server.coordinator import BelowQuorum, Coordinator
from fed_diffusion.server.mask_store import Bits
from fed_diffusion.server.open_round import Flight, Flights, OpenRound
from fed_diffusion.server.rounds import Rounds, Theta
from fed_diffusion.store.ledger import ClientRound, RoundSummary

logger = logging.getLogger(__name__)
UNTOLD: Numbers = {"loss": 0.0, "images": 0, "examples": 1, "seconds": 0.0}
"""What stands for a client's measurements until their sums are opened."""


class SecureRound:
    """Sends each exchange's messages, takes the answers, and opens the sum into the round's mean.

    Parameters
    ----------
    open
        The round in progress, with nothing in it yet; its recipes say who is asked.
    theta, state
        theta_r, and the optimiser's state where local.state is shared; else empty.
    quorum
        How many updates the round needs.
    attempt
        The number of the attempt; a later one has a higher number.

    Attributes
    ----------
    stage
        The exchange in progress.
    problem
        Why there is no sum; empty where too few updates counted, and None once it was opened.
    shunned
        Clients that must not be asked again in this round: what they send keeps it from a sum.
    """

    def __init__(
        self,
        setup: Setup,
        round: int,
        open: OpenRound,
        theta: Theta,
        state: Theta,
        rounds: Rounds,
        flights: Flights,
        quorum: int,
        attempt: int,
    ):
        self._open, self._quorum = open, quorum
        self._round, self._attempt = round, attempt
        self._theta, self._state, self._rounds, self._flights = theta, state, rounds, flights
        self._summed = setup.config.secure.losses == "summed"
        self._packed: dict[int, Bits | None] = {}
        self._behind: dict[int, tuple[Flight, int]] = {}
        """Client -> its task, and its number of examples."""
        self._begin(Stage.KEYS)
        self.problem: str | None = "the round was not brought to its end"
        self.shunned: set[int] = set()
        assert isinstance(open.mean, MaskedMean | PrivateMean)
        self._gathering = Gathering(
            round,
            setup.config.secure,
            theta,
            open.recipes,
            self._masks_of,
            max(1, len(open.recipes)),
            heaviest_of(setup.config.round),
            bool(state),
        )

    def exchanges(self) -> Iterator[Iterator[Task]]:
        """Yield the messages of one exchange after another; all answers are taken in between."""
        try:
            yield from self._stages()
        except (Unopened, PlanError, DivergedError) as error:
            self.problem = str(error)
        for fault in self._gathering.faults:
            whose: Fault = "node" if fault.surely else "nobody"
            self._open.reject(fault.client, fault.reason, None, 0, whose)
            self._open.failed += [fault.client] if fault.surely else []
            if fault.surely or self.problem is not None:
                self.shunned.add(fault.client)

    def _stages(self) -> Iterator[Iterator[Task]]:
        gathering = self._gathering
        yield self._small(Stage.KEYS)
        gathering.agree()
        yield self._small(Stage.SHARES)
        gathering.meet()
        yield self._tasks()
        gathering.name_odd()
        if len(gathering.weights) < self._quorum:
            self.problem = ""  # the round says so itself, with the reasons
            return
        gathering.level()
        yield self._small(Stage.OPEN)
        self._take_sums()
        self.problem = None

    def _take_sums(self) -> None:
        """Open the sums into the round's mean, and into its record what they hold of measurements.

        Raises
        ------
        Unopened
            They cannot be opened.
        DivergedError
            The mean loss is beyond all that honest training makes.
        """
        open, opening = self._open, self._gathering.opening()
        assert isinstance(open.mean, MaskedMean | PrivateMean)
        open.withheld = opening.into(open.mean, self._add_steps)
        if opening.numbers is None:
            return
        lines = alike(open.clients, opening.numbers)
        self._rounds.ledger.check_loss(lines[0].loss)
        open.clients = lines

    def _add_steps(self, client: int, masks: Masks) -> None:
        """Add how many steps are behind a client's moments, which the server knows by itself."""
        if isinstance(mean := self._open.mean, StatefulMean):
            flight, examples = self._behind[client]
            steps = self._rounds.steps(flight, masks, examples)
            mean.add_steps(steps, masks, self._gathering.weights[client])

    def _begin(self, stage: Stage) -> None:
        self.stage, self._open.counting = stage, stage == Stage.VECTORS
        self._made: set[int] = set()

    def _small(self, stage: Stage) -> Iterator[Task]:
        """The messages of an exchange that is not about theta."""
        self._begin(stage)
        gathering = self._gathering
        parts = {
            Stage.KEYS: lambda client: {},
            Stage.SHARES: gathering.share_parts,
            Stage.OPEN: gathering.open_parts,
        }[stage]
        for client in gathering.clients(stage):
            task = m.task(stage, self._round, client, parts(client), None, self._attempt)
            recipe = self._open.recipes[client]
            most = BESIDE if stage != Stage.SHARES else BESIDE + gathering.shares_size(client)
            self._send(task, Flight(self._round, recipe, 0, 1.0, 0.0, None, most=most))
            yield task

    def _tasks(self) -> Iterator[Task]:
        """The tasks of the round, with what else a client needs for its vector."""
        self._begin(Stage.VECTORS)
        gathering, open = self._gathering, self._open
        recipes = {c: open.recipes[c] for c in gathering.clients(Stage.VECTORS)}
        made = self._rounds.tasks(self._round, self._theta, self._state, recipes, open.masks)
        for plain, flight in made:
            parts = gathering.vector_parts(plain.client)
            about = self._round, plain.client, parts, plain.payload, self._attempt
            task = m.task(Stage.VECTORS, *about)
            most = BESIDE + gathering.most(plain.client)
            known = flight.recipe, task.payload.nbytes, flight.kept, flight.w2
            self._send(task, Flight(self._round, *known, None, flight.steps, most))
            yield task

    def _send(self, task: Task, flight: Flight) -> None:
        self._made.add(task.client)
        self._open.send(task)
        self._flights.send(task.client, flight, dict(self._theta))

    def take(self, flight: Flight, update: Update, node: int | None) -> None:
        """Take an answer.

        Raises
        ------
        UpdateError, RecipeError
            What is wrong with it.
        """
        if m.stage_of(update) != self.stage:
            raise UpdateError(f"it is no answer of the exchange of {self.stage.name.lower()}")
        if self.stage == Stage.KEYS:
            self._gathering.take_keys(update)
        elif self.stage == Stage.SHARES:
            self._gathering.take_shares(update)
        elif self.stage == Stage.OPEN:
            self._gathering.take_opened(update)
        else:
            self._take_vector(flight, update, node)

    def _take_vector(self, flight: Flight, update: Update, node: int | None) -> None:
        said = update
        if self._summed:  # nothing of it travels, whatever the client says
            numbers = update.payload.numbers | UNTOLD
            said = replace(update, payload=replace(update.payload, numbers=numbers))
        # against nobody else's: the client has multiplied by its number of images already
        measured, weight = self._rounds.read(flight, said, ())
        self._behind[update.client] = flight, measured["examples"]
        self._gathering.take_vector(update, weight, self._masks_of(update.client))
        self._open.count(flight, update, measured | {"weight": weight}, 0, node)

    def unsent(self) -> list[int]:
        """Clients whose message of the exchange in progress has not been made yet."""
        return [c for c in self._gathering.clients(self.stage) if c not in self._made]

    def counts(self, client: int) -> bool:
        """Whether a client's vector is in the sums already, whatever it fails to do later."""
        return client in self._gathering.weights

    def _masks_of(self, client: int) -> Masks:
        store, recipe = self._open.masks, self._open.recipes[client]
        if client in self._packed:
            return store.of(recipe, self._packed[client])
        masks = store.derive(recipe)
        self._packed[client] = store.pack(recipe, masks)
        return masks


def alike(clients: list[ClientRound], sums: Tensor) -> list[ClientRound]:
    """Return the lines of clients with the means of what all of them measured together."""
    loss, heldout, images, seconds = means_of(sums, count := len(clients))
    return [
        replace(
            client,
            loss=loss,
            holdout_loss=heldout,
            images=images // count + (place < images % count),  # so that their sum is right
            seconds=seconds,
        )
        for place, client in enumerate(sorted(clients, key=lambda it: it.client))
    ]


class SecureRounds(Rounds):
    """Rounds whose answers are parts of the protocol of an attempt."""

    attempt: SecureRound

    def take(
        self,
        open: OpenRound,
        flight: Flight,
        update: Update,
        theta: Theta,
        state: Theta,
        staleness: int,
        node: int | None = None,
    ) -> None:
        """Take an answer of the attempt's exchange; see `Rounds.take`."""
        self.attempt.take(flight, update, node)


class SecureCoordinator(Coordinator):
    """A coordinator that learns sums alone: a round is an attempt in four exchanges."""

    _rounds: SecureRounds

    def __init__(self, run: Config | Setup, theta: Theta):
        super().__init__(setup := Setup.of(run), theta)
        parts = self.participation, self.policy, self.norms, self.diagnostics, self.ledger
        self._rounds, self._setup = SecureRounds(setup, *parts), setup
        self._shunned: tuple[int, set[int]] = 0, set()
        """A round, and the clients that kept its attempts from a sum."""
        # clients outlive this process: they take no attempt that is not after all they have seen
        self._attempts = time.time_ns() // 1000

    def exchanges(
        self, round: int, available: Collection[int] | None = None
    ) -> Iterator[Iterator[Task]]:
        """Begin a round anew, and yield the messages of each exchange with the clients in turn."""
        self.flights.forget()
        shunned = self._shunned[1] if self._shunned[0] == round else set()
        asked = [c for c in self.participants(round, available) if c not in shunned]
        self.open = self._rounds.begin(round, self.theta, self.moments, asked, available)
        parts = self.open, self.theta, self.moments, self._rounds, self.flights, self.quorum()
        self._attempts += 1
        attempt = self._rounds.attempt = SecureRound(self._setup, round, *parts, self._attempts)
        yield from attempt.exchanges()
        self._shunned = round, shunned | attempt.shunned

    def reject(
        self,
        client: int,
        reason: str,
        node: int | None = None,
        nbytes: int = 0,
        fault: Fault = "server",
    ) -> None:
        """Note what a client has failed to send; one whose vector has come counts all the same."""
        if not self._rounds.attempt.counts(client):
            super().reject(client, reason, node, nbytes, fault)
            return
        logger.warning("client %d counts, and opens no sum: %s", client, clean(reason))
        self.flights.land(client)

    def unsent(self) -> list[int]:
        """Clients whose message of the exchange in progress has not been made yet."""
        return self._rounds.attempt.unsent()

    def enough(self) -> bool:
        """Always wait for everybody: whoever has sent shares and no vector is missed."""
        return False

    def close_round(self) -> RoundSummary:
        """Close the round, if its sum was opened; see `Coordinator.close_round`."""
        state, round, problem = self._state(), self.round + 1, self._rounds.attempt.problem
        if not problem:
            return super().close_round()
        self.open = None
        self.flights.close()
        self.ledger.give_up(state)
        self.flights.again_from(round)
        raise BelowQuorum(f"round {round}: there is no sum: {problem}")


def coordinator_of(run: Config | Setup, theta: Theta) -> Coordinator:
    """Return the coordinator of a run: one that learns sums alone, where the run asks for that."""
    setup = Setup.of(run)
    kind = SecureCoordinator if setup.config.secure.aggregation else Coordinator
    return kind(setup, theta)
