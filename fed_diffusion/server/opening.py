"""How a round begins: who keeps what, the average that is filled, and the tasks that go out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.aggregation.robust import RobustMean
from fed_diffusion.config import Config
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.masks.recipe import Numbers, Recipe, kept_fraction, pruning_error
from fed_diffusion.masks.spaces import Layout
from fed_diffusion.protocol.messages import EXAMPLES_LIMIT, Task
from fed_diffusion.protocol.wire import Payload, cast_theta, encode_task
from fed_diffusion.server.flights import Flight
from fed_diffusion.server.mask_store import MaskStore
from fed_diffusion.server.open_round import OpenRound
from fed_diffusion.server.participation import Participation
from fed_diffusion.server.policies import RoundPolicy

Theta = Mapping[str, Tensor]


class Opening:
    """Opens the rounds of a run.

    Parameters
    ----------
    layout
        The network's channel spaces, where whole channels are dropped.
    """

    def __init__(
        self,
        config: Config,
        participation: Participation,
        policy: RoundPolicy,
        layout: Layout | None,
    ):
        self._config = config
        self._participation = participation
        self._policy = policy
        self._layout = layout

    def begin(
        self, round: int, theta: Theta, asked: list[int], available: Collection[int] | None
    ) -> OpenRound:
        """A round at theta_r with nothing in it yet.

        Parameters
        ----------
        asked
            The clients that get a task at once.
        available
            Clients that can be reached; None means all.
        """
        participation, overlapping = self._participation, self._policy.overlapping
        eligible = participation.eligible()
        masks = self.masks(theta)
        target = self._policy.target(len(eligible))
        mean: MaskedMean
        if self._config.privacy.clip is not None:
            mean, target = self._private_mean(round, theta, masks), len(asked)
        elif overlapping:
            mean = mean_of(self._config, theta, target)
        else:
            mean = mean_of(self._config, theta, max(1, len(asked)))
        recipes = self.recipes(round, eligible if overlapping else asked, theta)
        return OpenRound(mean, recipes, masks, target, participation.absent(available))

    def recipes(self, round: int, clients: list[int], theta: Theta) -> dict[int, Recipe]:
        """Client -> the recipe of its mask in a round at theta_r."""
        keeps = self._participation.ratios(clients)
        return plan_round(self._config, round, keeps, theta, self._layout)

    def masks(self, theta: Theta) -> MaskStore:
        """An empty store of masks of theta_r."""
        return MaskStore(theta, self._layout, self._policy.overlapping)

    def _private_mean(self, round: int, theta: Theta, masks: MaskStore) -> PrivateMean:
        """Its denominators count all clients of the run, be they away or banned."""
        recipes = self.recipes(round, self._participation.able(), theta).values()
        everyone = (masks.derive(r) if r.kind != "full" else {} for r in recipes)
        return PrivateMean(theta, everyone, self._config.round.fraction, self._config.privacy)


def mean_of(config: Config, theta: Theta, workers: int) -> MaskedMean:
    """An empty average of the configured kind, with room for so many updates."""
    settings = config.round
    if settings.aggregation == "mean":
        by_examples = settings.weighting == "examples"
        return MaskedMean(theta, workers, EXAMPLES_LIMIT if by_examples else 1)
    trim = 0.5 if settings.aggregation == "median" else settings.trim
    return RobustMean(theta, trim, workers)


def outgoing(
    config: Config,
    round: int,
    theta: Theta,
    recipes: Mapping[int, Recipe],
    masks: MaskStore,
    question: Callable[[int], Numbers],
) -> Iterator[tuple[Task, Flight]]:
    """Each client's task, made when it is asked for, and what the server must remember of it.

    Parameters
    ----------
    theta
        theta_r; it is cast once for all clients.
    question
        Client -> what its task asks beside training.
    """
    casts = cast_theta(theta, config, round)
    full: Payload | None = None
    for client, recipe in recipes.items():
        kept, w2, bits = 1.0, 0.0, None
        if recipe.kind == "full":  # the same bytes for everyone who trains the whole network
            full = full or encode_task(casts, recipe, {})
            payload = Payload(full.arrays, recipe.to_metrics() | question(client))
        else:
            mask = masks.derive(recipe)
            payload = encode_task(casts, recipe, mask)
            kept, w2 = kept_fraction(mask, theta), pruning_error(mask, theta)
            bits = masks.pack(recipe, mask)
        yield Task(round, client, payload), Flight(round, recipe, payload.nbytes, kept, w2, bits)
