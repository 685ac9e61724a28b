"""A test of a user's mask family on the run's network, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.masks.families.contract import Family
from fed_diffusion.masks.mask import Block, Mask, Masks, Scattered
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.spaces import Layout


def check_plan(
    recipes: Mapping[int, Recipe], kind: str, round: int, keeps: Mapping[int, float]
) -> None:
    """Refuse a plan that is not for these clients.

    Raises
    ------
    ValueError
        The message says which client's recipe breaks the contract.
    """
    if recipes.keys() != keeps.keys():
        raise ValueError(f"it planned for clients {sorted(recipes)}, not {sorted(keeps)}")
    for client, recipe in recipes.items():
        got = (recipe.kind, recipe.round, recipe.client, recipe.keep)
        wanted = (kind, round, client, keeps[client])
        if got != wanted:
            raise ValueError(
                f"the recipe of client {client} has (kind, round, client, keep) = {got}, "
                f"and not {wanted}"
            )


def check_family(
    family: Family,
    kind: str,
    keeps: Mapping[int, float],
    theta: Mapping[str, Tensor],
    spaces: Layout | None,
) -> None:
    """Plan a round, send the recipes, derive the masks on both sides, and compare.

    Parameters
    ----------
    keeps
        Client -> keep ratio below 1, of two clients with the same ratio at least.
    theta
        Values like those of the network in training; they are left as they are.

    Raises
    ------
    ValueError, TypeError, RecipeError
        The family breaks the contract; the message says how.
    """
    if family.sends_bits and family.shrinks:
        raise ValueError("it both sends bits and shrinks the network; blocks have no bits")
    before = {name: value.clone() for name, value in theta.items()}
    recipes = family.plan(1, keeps, theta, spaces)
    check_plan(recipes, kind, 1, keeps)
    masks = {}
    for client, recipe in recipes.items():
        arrived = Recipe.from_metrics(recipe.to_metrics())
        if arrived != recipe:
            raise ValueError(f"its recipe changes on the way: {recipe.differences(arrived)}")
        masks[client] = family.derive(arrived, theta, spaces)
        _check_masks(family, masks[client], theta)
        if family.sends_bits:
            family.check_bits(arrived, masks[client], theta)
        elif _on_a_client(family, arrived, theta, spaces) != dict(masks[client]):
            raise ValueError(
                "its masks change with theta's values, which a client does not have: "
                "set sends_bits = True"
            )
    if not all(torch.equal(before[name], value) for name, value in theta.items()):
        raise ValueError("it changes theta, which it is given to look at")
    if family.shared:
        _check_shared(recipes, masks)


def _on_a_client(
    family: Family, recipe: Recipe, theta: Mapping[str, Tensor], spaces: Layout | None
) -> dict[str, Mask]:
    """Return the masks from names and shapes alone."""
    blank = {name: torch.empty(value.shape, device="meta") for name, value in theta.items()}
    try:
        return dict(family.derive(recipe, blank, spaces))
    except RecipeError:
        raise
    except Exception as error:  # whatever it did with values that are not there
        raise ValueError(
            f"its masks cannot be derived from names and shapes, which are all that a client has "
            f"({type(error).__name__}: {error}); set sends_bits = True if they need theta's values"
        ) from error


def _check_masks(family: Family, masks: Masks, theta: Mapping[str, Tensor]) -> None:
    wanted: type[Mask] = Block if family.shrinks else Scattered
    for name, mask in masks.items():
        if name not in theta:
            raise ValueError(f"it masks {name!r}, which the network lacks")
        if not isinstance(mask, wanted):
            raise TypeError(
                f"the mask of {name} is a {type(mask).__name__}, not a {wanted.__name__} "
                f"(shrinks = {family.shrinks})"
            )
        if mask.shape != tuple(theta[name].shape):
            raise ValueError(f"the mask of {name} is of shape {mask.shape}")


def _check_shared(recipes: Mapping[int, Recipe], masks: Mapping[int, Masks]) -> None:
    first: dict[float, Masks] = {}
    for client, recipe in recipes.items():
        if masks[client] != first.setdefault(recipe.keep, masks[client]):
            raise ValueError(
                f"clients of the keep ratio {recipe.keep:g} have different masks: shared = False"
            )
