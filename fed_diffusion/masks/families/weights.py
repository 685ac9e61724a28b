"""Masks that drop single weights: drawn, the smallest, or spread evenly over the clients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox
from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks import scattered
from fed_diffusion.masks.families.contract import Family
from fed_diffusion.masks.mask import Masks, Scattered
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.spaces import Layout

SCOPES = ("weights", "all")
PER = ("tensor", "global")
WORDS = range(scattered.WORD)
Theta = Mapping[str, Tensor]


class Random(Family):
    """Each coordinate in scope is kept with probability `keep`, drawn per client and round."""

    def __init__(self, pruning: PruningConfig, seed: int):
        self._options = {"scope": pruning.scope}
        self._seed = seed

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        return {
            client: Recipe("random", keep, self._seed, round, client, self._options)
            for client, keep in keeps.items()
        }

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        (scope,) = recipe.read(scope=SCOPES)
        stream = philox(recipe.seed, Purpose.MASK, recipe.round, recipe.client)
        return _masks(scattered.random_mask(in_scope(theta, scope), recipe.keep, stream))


class TopK(Family):
    """The largest |theta_r| are kept, of each tensor or of all together (`per`)."""

    sends_bits = True
    shared = True

    def __init__(self, pruning: PruningConfig, seed: int):
        self._options = {"scope": pruning.scope, "per": pruning.per}
        self._seed = seed

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        return {
            client: Recipe("topk", keep, self._seed, round, client, self._options)
            for client, keep in keeps.items()
        }

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        scope, per = recipe.read(scope=SCOPES, per=PER)
        return _masks(scattered.top_k_mask(in_scope(theta, scope), recipe.keep, per))

    def check_bits(self, recipe: Recipe, masks: Masks, theta: Theta) -> None:
        """Refuse bits that mask tensors out of scope, or keep another number of weights than the
        ratio.
        """
        scope, per = recipe.read(scope=SCOPES, per=PER)
        sizes = sizes_of(masks, theta, scope)
        kept = {name: mask.count() for name, mask in masks.items()}
        if per == "global":
            sizes = {"all tensors": sum(sizes.values())}
            kept = {"all tensors": sum(kept.values())}
        for name, size in sizes.items():
            if kept[name] != scattered.rounded(recipe.keep, size):
                raise RecipeError(
                    f"recipe: the bits keep {kept[name]} of {size} in {name}; "
                    f"keep = {recipe.keep:g} means {scattered.rounded(recipe.keep, size)}"
                )


class BalancedWeights(Family):
    """Every coordinate is dropped by as few clients of a round as the ratios permit.

    A recipe says where the client's interval starts and where all of them end, as parts of 2^32.
    """

    sends_bits = True

    def __init__(self, pruning: PruningConfig, seed: int):
        self._options = {"unit": "weights", "scope": pruning.scope, "per": pruning.per}
        self._seed = seed

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        starts, end = scattered.balanced_starts(keeps)
        recipes = {}
        for client, keep in keeps.items():
            options = self._options | {"start": starts[client], "end": end}
            recipes[client] = Recipe("balanced", keep, self._seed, round, client, options)
        return recipes

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        scope, per, start, end = self._read(recipe)
        stream = philox(recipe.seed, Purpose.MASK, recipe.round)  # the same for all clients
        scoped = in_scope(theta, scope)
        return _masks(scattered.balanced_mask(scoped, recipe.keep, per, start, end, stream))

    def check_bits(self, recipe: Recipe, masks: Masks, theta: Theta) -> None:
        """Refuse bits that mask tensors out of scope."""
        sizes_of(masks, theta, self._read(recipe)[0])

    @staticmethod
    def _read(recipe: Recipe) -> tuple[str, str, int, int]:
        unit = ("weights",)
        _, *rest = recipe.read(unit=unit, scope=SCOPES, per=PER, start=WORDS, end=WORDS)
        scope, per, start, end = rest
        return scope, per, start, end


def in_scope(theta: Theta, scope: str) -> dict[str, Tensor]:
    """Return the tensors that a scattered mask may drop weights of.

    Parameters
    ----------
    scope
        weights: tensors of two or more dimensions, except time and label embeddings; or all.
    """
    return {
        name: value
        for name, value in theta.items()
        if scope == "all" or (value.dim() >= 2 and not {"time", "label"} & set(name.split(".")))
    }


def _masks(bools: Theta) -> Masks:
    return {name: Scattered(kept) for name, kept in bools.items()}


def sizes_of(masks: Masks, theta: Theta, scope: str) -> dict[str, int]:
    """Return how many values the tensors in scope have; refuse masks of any other tensors."""
    sizes = {name: value.numel() for name, value in in_scope(theta, scope).items()}
    if masks.keys() != sizes.keys():
        odd = sorted(masks.keys() ^ sizes.keys())[:3]
        raise RecipeError(
            f"recipe: its bits are not for the tensors that it masks; they differ in {odd}"
        )
    return sizes
