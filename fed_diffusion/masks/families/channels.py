"""Masks that drop channel groups or ranks, so that what a client trains is physically smaller."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks import channels
from fed_diffusion.masks.families.contract import Family
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe, RecipeError, Value
from fed_diffusion.masks.spaces import Channels, Layout

Theta = Mapping[str, Tensor]


class ChosenChannels(Family):
    """The setting `choice` says which groups stay; see `masks.channels.CHOICES`.

    The groups are those of a U-Net's channels, or the ranks of an adapter (`spaces.Ranks`).

    Where only theta_r tells (magnitude), the recipe names the kept groups, all spaces one after
    another.
    """

    shrinks = True

    def __init__(self, pruning: PruningConfig, seed: int):
        self._kind, self._choice = pruning.kind, pruning.choice
        self._seed = seed

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        layout = _known(spaces)
        options: dict[float, dict[str, Value]] = {
            keep: {"choice": self._choice} for keep in keeps.values()
        }
        if self._choice == "magnitude":
            for keep, named in options.items():
                kept = channels.magnitude(layout, layout.counts(keep), theta)
                named["groups"] = channels.flatten(layout, kept)
        return {
            client: Recipe(self._kind, keep, self._seed, round, client, options[keep])
            for client, keep in keeps.items()
        }

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        layout = _known(spaces)
        try:
            return layout.blocks(self._kept(recipe, layout))
        except ValueError as error:
            raise _named(error) from error

    @staticmethod
    def _kept(recipe: Recipe, layout: Layout) -> Channels:
        counts = layout.counts(recipe.keep)
        if recipe.options.get("choice") == "magnitude":
            _, groups = recipe.read(choice=("magnitude",), groups=())
            return channels.unflatten(layout, counts, groups)
        (choice,) = recipe.read(choice=channels.CHOICES)
        if choice == "rolling":
            return channels.rolling(layout, counts, recipe.round)
        if choice == "random":
            return channels.random(layout, counts, recipe.seed, recipe.round, recipe.client)
        return channels.ordered(layout, counts)


class BalancedChannels(Family):
    """No group is dropped by many more clients of a round than other groups; see
    `channels.balanced`.
    """

    shrinks = True

    def __init__(self, pruning: PruningConfig, seed: int):
        self._seed = seed

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        layout = _known(spaces)
        recipes = {}
        for client, kept in channels.balanced(layout, keeps, round, theta).items():
            groups = channels.flatten(layout, kept)
            options: dict[str, Value] = {"unit": "channels", "groups": groups}
            recipes[client] = Recipe("balanced", keeps[client], self._seed, round, client, options)
        return recipes

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        layout = _known(spaces)
        _, groups = recipe.read(unit=("channels",), groups=())
        try:
            kept = channels.unflatten(layout, layout.counts(recipe.keep), groups)
        except ValueError as error:
            raise _named(error) from error
        return layout.blocks(kept)


def _known(spaces: Layout | None) -> Layout:
    if spaces is None:
        raise RecipeError(
            "recipe: it drops channels of a network whose channel spaces are not known"
        )
    return spaces


def _named(error: ValueError) -> RecipeError:
    return error if isinstance(error, RecipeError) else RecipeError(f"recipe: {error}")
