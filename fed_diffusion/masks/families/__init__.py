"""Mask families: what pruning.kind may name, built in or the user's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks.families.channels import BalancedChannels, ChosenChannels
from fed_diffusion.masks.families.contract import Family, FamilyFactory
from fed_diffusion.masks.families.turns import BalancedByMagnitude
from fed_diffusion.masks.families.weights import BalancedWeights, Random, TopK
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.spaces import Layout

KEY = "pruning.kind"


class Full(Family):
    """Every client keeps everything."""

    def __init__(self, pruning: PruningConfig, seed: int):
        pass

    def plan(
        self,
        round: int,
        keeps: Mapping[int, float],
        theta: Mapping[str, Tensor],
        spaces: Layout | None,
    ) -> dict[int, Recipe]:
        return {client: Recipe(round=round, client=client) for client in keeps}

    def derive(self, recipe: Recipe, theta: Mapping[str, Tensor], spaces: Layout | None) -> Masks:
        return {}


def _balanced(pruning: PruningConfig, seed: int) -> Family:
    if pruning.unit == "channels":
        return BalancedChannels(pruning, seed)
    family = BalancedByMagnitude if pruning.by == "magnitude" else BalancedWeights
    return family(pruning, seed)


FAMILIES: dict[str, FamilyFactory] = {
    "full": Full,
    "random": Random,
    "topk": TopK,
    "channels": ChosenChannels,
    "balanced": _balanced,
    "ranks": ChosenChannels,
}


def family_of(pruning: PruningConfig, seed: int) -> Family:
    """Return the configured mask family.

    Raises
    ------
    ConfigError
        There is no such family, or it refuses its settings.
    """
    made: FamilyFactory = resolve(KEY, pruning.kind, FAMILIES)
    if pruning.kind in FAMILIES:
        return made(pruning, seed)
    with blamed(KEY, pruning.kind):
        family = made(pruning, seed)
        if not isinstance(family, Family):
            raise TypeError("it did not return a mask family: inherit from fed_diffusion.Family")
    return family


def derive(
    family: Family, recipe: Recipe, theta: Mapping[str, Tensor], spaces: Layout | None = None
) -> Masks:
    """Return the masks that a recipe describes, or none where everything is kept.

    Raises
    ------
    RecipeError
        The recipe is not one of this network.
    """
    return {} if recipe.whole() else family.derive(recipe, theta, spaces)


__all__ = ["FAMILIES", "Family", "FamilyFactory", "RecipeError", "derive", "family_of"]
