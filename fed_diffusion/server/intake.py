"""All that an update is checked for before it counts, and the weight with which it then counts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.masks.recipe import Masks, Recipe, RecipeError
from fed_diffusion.protocol.codecs import kept_of
from fed_diffusion.protocol.errors import LimitError
from fed_diffusion.protocol.messages import EXAMPLES_LIMIT, Update, measurements
from fed_diffusion.protocol.wire import decode_update
from fed_diffusion.server.diagnostics import Diagnostics
from fed_diffusion.server.flights import Flight
from fed_diffusion.server.norms import NormLimit
from fed_diffusion.server.open_round import OpenRound
from fed_diffusion.server.policies import RoundPolicy
from fed_diffusion.server.summary import Ledger


class Intake:
    """Checks updates and adds them to the open round."""

    def __init__(
        self,
        config: Config,
        policy: RoundPolicy,
        norms: NormLimit,
        diagnostics: Diagnostics,
        ledger: Ledger,
    ):
        self._config = config
        self._policy = policy
        self._norms = norms
        self._diagnostics = diagnostics
        self._ledger = ledger

    def take(
        self,
        state: OpenRound,
        flight: Flight,
        update: Update,
        theta: Mapping[str, Tensor],
        staleness: int,
    ) -> None:
        """Add an update; where it is bad, nothing of it has been added.

        Parameters
        ----------
        flight
            The task that the update answers.
        theta
            theta_r, which the round began with.
        staleness
            How often theta has changed since the task was sent.

        Raises
        ------
        UpdateError, RecipeError
            What is wrong with it.
        """
        numbers = update.payload.numbers
        recipe = Recipe.from_metrics(numbers)
        if recipe != flight.recipe:
            odd = recipe.differences(flight.recipe)
            raise RecipeError(f"the recipe is not the one agreed on: {odd}")
        measured = measurements(numbers)
        self._ledger.check_loss(measured["loss"])
        masks = state.masks.of(recipe, flight.bits)
        arrays, answer = self._diagnostics.split(update)
        values = decode_update(arrays, theta, masks, self._config)
        rms = self._norms.check(values, theta, masks)
        weight = weight_of(self._config, measured["examples"])
        factor = self._policy.weight(staleness)
        state.mean.add(damped(values, theta, masks, factor), masks, weight)
        self._diagnostics.add(update.client, answer)
        state.count(flight, update, measured, staleness)
        state.norms += [] if rms is None else [rms]


def weight_of(config: Config, examples: int) -> int:
    """How often an update counts: once, or as often as its client has images.

    Raises
    ------
    LimitError
        There is no room for so many images.
    """
    if config.round.weighting != "examples":
        return 1
    if examples > EXAMPLES_LIMIT:
        raise LimitError(
            f"it trained on {examples} images, and round.weighting = examples has room for "
            f"{EXAMPLES_LIMIT} on one client: use uniform, or make several clients of it"
        )
    return examples


def damped(
    values: dict[str, Tensor],
    theta: Mapping[str, Tensor],
    masks: Masks,
    factor: float,
) -> dict[str, Tensor]:
    """theta + factor Delta, the very same values where the factor is 1."""
    if factor == 1:
        return values
    kept = {name: kept_of(theta[name], masks.get(name)) for name in values}
    return {name: kept[name] + (value - kept[name]) * factor for name, value in values.items()}
