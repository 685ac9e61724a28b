"""How a round begins, the tasks that go out, and the updates that come in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from fed_diffusion.aggregation.named import Aggregator, aggregator_of, heaviest_of
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.aggregation.stateful import StatefulMean
from fed_diffusion.build import Setup
from fed_diffusion.config.schema import RoundConfig
from fed_diffusion.masks.mask import Masks, kept_fraction, kept_values, pruning_error
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.protocol.errors import LimitError, UpdateError
from fed_diffusion.protocol.messages import EXAMPLES_LIMIT, Task, Update, measurements
from fed_diffusion.protocol.moments import (
    MOST_STEPS,
    STEPS,
    cast_state,
    decode_moments,
    group,
    parted,
    spread,
)
from fed_diffusion.protocol.wire import (
    Payload,
    Wire,
    cast_theta,
    decode_update,
    encode_task,
    largest_update,
)
from fed_diffusion.server.diagnostics import Diagnostics
from fed_diffusion.server.gap import Gap
from fed_diffusion.server.mask_store import MaskStore
from fed_diffusion.server.norms import NormLimit
from fed_diffusion.server.open_round import Flight, OpenRound
from fed_diffusion.server.participation import Participation
from fed_diffusion.server.policies import RoundPolicy
from fed_diffusion.server.summary import Ledger

Theta = Mapping[str, Tensor]


class Rounds:
    """Begins rounds and takes their updates; theta and the open round are the coordinator's."""

    def __init__(
        self,
        setup: Setup,
        participation: Participation,
        policy: RoundPolicy,
        norms: NormLimit,
        diagnostics: Diagnostics,
        ledger: Ledger,
    ):
        self._config = config = setup.config
        self._layout = setup.layout
        self._family = setup.family
        self._wire = Wire(config.wire, config.pruning, config.local, setup.family, config.seed)
        self._participation = participation
        self._policy = policy
        self._norms = norms
        self._diagnostics = diagnostics
        self.ledger = ledger

    def begin(
        self,
        round: int,
        theta: Theta,
        state: Theta,
        asked: list[int],
        available: Collection[int] | None,
    ) -> OpenRound:
        """Return a round at theta_r with nothing in it yet.

        Parameters
        ----------
        state
            The optimiser's state, where local.state is shared; else empty.
        asked
            The clients that get a task at once.
        available
            Clients that can be reached; None means all.
        """
        participation, overlapping = self._participation, self._policy.overlapping
        eligible = participation.eligible()
        masks = self.masks(theta)
        target = self._policy.target(len(eligible))
        mean: Aggregator
        if self._config.privacy.clip is not None:
            mean, target = self._private_mean(round, theta, masks), len(asked)
        else:
            mean = self._mean(theta, state, target if overlapping else max(1, len(asked)))
        recipes = self.recipes(round, eligible if overlapping else asked, theta)
        gap = Gap(self._config.lora, self._config.round, self._config.privacy, theta)
        return OpenRound(mean, recipes, masks, gap, target, participation.absent(available))

    def recipes(self, round: int, clients: list[int], theta: Theta) -> dict[int, Recipe]:
        """Return client -> the recipe of its mask in a round at theta_r."""
        keeps = self._participation.ratios(clients)
        kind = self._config.pruning.kind
        return plan_round(self._family, kind, round, keeps, theta, self._layout)

    def masks(self, theta: Theta) -> MaskStore:
        """Return an empty store of masks of theta_r."""
        return MaskStore(theta, self._family, self._layout, self._policy.overlapping)

    def tasks(
        self,
        round: int,
        theta: Theta,
        state: Theta,
        recipes: Mapping[int, Recipe],
        masks: MaskStore,
    ) -> Iterator[tuple[Task, Flight]]:
        """Yield each client's task, made when it is asked for, and what is to be remembered of it.

        Parameters
        ----------
        theta, state
            theta_r and the optimiser's state; they are cast once for all of these clients.
        """
        wire, seed = self._config.wire, self._config.seed
        casts = cast_theta(theta, self._wire, round) | cast_state(state, wire.state, seed, round)
        steps = group(state, STEPS)
        full: Payload | None = None
        for client, recipe in recipes.items():
            kept, w2, bits = 1.0, 0.0, None
            if recipe.whole():  # the same bytes for everyone who trains the whole network
                full = full or encode_task(casts, recipe, {})
                asked = self._diagnostics.question(client)
                payload = Payload(full.arrays, recipe.to_metrics() | asked)
            else:
                mask = masks.derive(recipe)
                payload = encode_task(casts, recipe, mask)
                kept, w2 = kept_fraction(mask, theta), pruning_error(mask, theta)
                bits = masks.pack(recipe, mask)
            most = largest_update(theta, kept, self._wire)
            flight = Flight(round, recipe, payload.nbytes, kept, w2, bits, steps, most)
            yield Task(round, client, payload), flight

    def again(self, round: int, client: int, version: Theta) -> tuple[Task, Flight]:
        """A client's task of an earlier round, from the theta and the state it began on."""
        theta, state = parted(version)
        recipe = self.recipes(round, self._participation.eligible(), theta)[client]
        ((task, flight),) = self.tasks(round, theta, state, {client: recipe}, self.masks(theta))
        return task, flight

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
        """Add an update; where it is bad, nothing of it has been added.

        Parameters
        ----------
        flight
            The task that the update answers.
        theta, state
            theta_r and the optimiser's state, which the round began with.
        staleness
            How often theta has changed since the task was sent.
        node
            Which node has sent it, where one has.

        Raises
        ------
        UpdateError, RecipeError
            The update is bad; the message says why.
        """
        measured, weight = self.read(flight, update, open.recipes)
        masks = open.masks.of(flight.recipe, flight.bits)
        arrays, answer = self._diagnostics.split(update)
        sent = [n for n in arrays if n in state and not n.startswith(STEPS)]
        moments = {name: arrays.pop(name) for name in sent}
        values = decode_update(arrays, theta, masks, self._wire)
        rms = self._norms.check(values, theta, masks)
        factor = self._policy.weight(staleness)
        if state:
            values |= decode_moments(moments, theta, masks, self._config.wire.state)
            values |= self.steps(flight, masks, measured["examples"])
        whole = {**theta, **state}
        open.mean.add(damped(values, whole, spread(masks, whole), factor), masks, weight)
        open.gap.add(update.client, values, masks, weight)
        self._diagnostics.add(update.client, answer)
        open.count(flight, update, measured | {"weight": weight}, staleness, node)
        open.norms += [] if rms is None else [rms]

    def read(
        self, flight: Flight, update: Update, asked: Collection[int]
    ) -> tuple[dict[str, Any], int]:
        """Return what an update says beside its values, checked: its measurements, and its weight.

        Parameters
        ----------
        asked
            The clients that the round has asked.

        Raises
        ------
        UpdateError, RecipeError
            The message says what is wrong with it.
        """
        numbers = update.payload.numbers
        recipe = Recipe.from_metrics(numbers)
        if recipe != flight.recipe:
            odd = recipe.differences(flight.recipe)
            raise RecipeError(f"the recipe is not the one agreed on: {odd}")
        measured = measurements(numbers)
        self.ledger.check_loss(measured["loss"])
        said = self._participation.images.get(update.client)
        weight = weight_of(self._config.round, measured["examples"], said)
        most = self._participation.heaviest(update.client, asked)
        return measured, int(max(1, min(weight, most)))  # no client alone decides

    def _mean(self, theta: Theta, state: Theta, workers: int) -> Aggregator:
        """Return an empty average of theta, and of the optimiser's state where there is one."""
        settings = self._config.round
        if not state:
            return aggregator_of(theta, workers, settings)
        return StatefulMean(theta, state, workers, heaviest_of(settings))

    def steps(self, flight: Flight, masks: Masks, examples: int) -> dict[str, Tensor]:
        """Return the steps behind a client's moments: those that it began with, and its own."""
        taken = self._config.local.steps_of(examples)
        began = kept_values(flight.steps, masks)
        return {STEPS + n: (steps + taken).clamp_(max=MOST_STEPS) for n, steps in began.items()}

    def _private_mean(self, round: int, theta: Theta, masks: MaskStore) -> PrivateMean:
        """Return a private mean, whose denominators count all clients, also absent or banned
        ones.
        """
        recipes = self.recipes(round, self._participation.able(), theta).values()
        everyone = (masks.derive(recipe) for recipe in recipes)
        return PrivateMean(theta, everyone, self._config.round.fraction, self._config.privacy)


def weight_of(settings: RoundConfig, examples: int, said: int | None = None) -> int:
    """How often an update counts: once, or as often as its client has images.

    Parameters
    ----------
    said
        The number of images that its node named when it joined; None where none was named.

    Raises
    ------
    UpdateError
        The update names more images than the node did.
    LimitError
        The sums have no room for so many images.
    """
    if settings.weighting != "examples":
        return 1
    if said is not None and examples > said:
        raise UpdateError(
            f"it says that it trained on {examples} images, but its node had {said} when it joined"
        )
    if examples > EXAMPLES_LIMIT:
        raise LimitError(
            f"it trained on {examples} images, and round.weighting = examples has room for "
            f"{EXAMPLES_LIMIT} on one client: use uniform, or make several clients of it"
        )
    return examples


def damped(
    values: dict[str, Tensor],
    theta: Theta,
    masks: Masks,
    factor: float,
) -> dict[str, Tensor]:
    """Return theta + factor Delta; the very same values where the factor is 1."""
    if factor == 1:
        return values
    kept = kept_values(theta, masks)
    return {name: kept[name] + (value - kept[name]) * factor for name, value in values.items()}
