"""Who keeps what in a round: every participant's recipe, given the participants' keep ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fed_diffusion.config import Config, ConfigError
from fed_diffusion.masks import channels, scattered
from fed_diffusion.masks.levels import keep_ratios
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.masks.spaces import Layout


def known_ratios(config: Config) -> dict[int, float]:
    """Client -> keep ratio, as far as the configuration knows it; else the nodes say it."""
    if config.pruning.budget != "level":
        return {}
    if config.pruning.baseline == "small":  # everyone trains the whole of a small network
        return dict.fromkeys(range(config.clients), 1.0)
    return dict(enumerate(keep_ratios(config)))


def able(config: Config, keeps: Mapping[int, float]) -> list[int]:
    """The clients that may train: all, or under the baseline `exclusive` those that keep it all.

    Parameters
    ----------
    keeps
        Client -> keep ratio.
    """
    alone = config.pruning.baseline == "exclusive"
    return [client for client, keep in sorted(keeps.items()) if keep == 1 or not alone]


def check_pruning(config: Config, layout: Layout | None) -> None:
    """Refuse ratios that cannot be used.

    Raises
    ------
    ConfigError
        A ratio below the smallest sub-network; a baseline with nobody weak or nobody strong.
    """
    pruning = config.pruning
    known = {"level": keep_ratios(config), "node": (), "auto": pruning.ladder}
    ratios = known[pruning.budget]
    if pruning.baseline is not None and min(ratios) == 1:
        raise ConfigError(
            f"pruning.baseline = {pruning.baseline!r} compares with weak workers, and every worker "
            "has the whole network; set pruning.level to L, M or S, or pruning.keep."
        )
    if pruning.baseline == "exclusive" and max(ratios) < 1:
        raise ConfigError(
            "pruning.baseline = 'exclusive' trains only workers with the whole network, and none "
            f"has it (pruning.keep = {pruning.keep})."
        )
    for keep in set(ratios):
        try:
            if layout is not None:
                layout.counts(keep)
        except ValueError as error:
            raise ConfigError(f"pruning: {error}.") from error


def plan_round(
    config: Config,
    round: int,
    keeps: Mapping[int, float],
    theta: Mapping[str, Tensor],
    layout: Layout | None = None,
) -> dict[int, Recipe]:
    """The recipe of every participant; a keep ratio of 1 is the whole network, whatever the kind.

    Parameters
    ----------
    keeps
        Participant -> keep ratio.
    theta
        theta_r, which magnitudes are taken from.
    layout
        The network's channel spaces, where whole channels are dropped.
    """
    pruning = config.pruning
    recipes: dict[int, Recipe] = {}
    for client, keep in keeps.items():
        if keep == 1:
            recipes[client] = Recipe(round=round, client=client, scope=pruning.scope)
            continue
        recipes[client] = Recipe(
            kind=pruning.kind,
            keep=keep,
            seed=config.seed,
            round=round,
            client=client,
            scope=pruning.scope,
            per=pruning.per,
            choice=pruning.choice,
            unit=pruning.unit,
        )
    weak = {client: keeps[client] for client, recipe in recipes.items() if recipe.kind != "full"}
    if not weak:
        return recipes
    if pruning.kind == "balanced" and pruning.unit == "weights":
        starts, end = scattered.balanced_starts(weak)
        return recipes | {c: replace(recipes[c], start=starts[c], end=end) for c in weak}
    if pruning.kind == "balanced":
        assert layout is not None
        kept = channels.balanced(layout, weak, round, theta)
        return recipes | {
            c: replace(recipes[c], groups=channels.flatten(layout, kept[c])) for c in weak
        }
    if pruning.kind == "channels" and pruning.choice == "magnitude":
        assert layout is not None
        by_keep = {
            keep: channels.flatten(layout, channels.magnitude(layout, layout.counts(keep), theta))
            for keep in set(weak.values())
        }
        return recipes | {c: replace(recipes[c], groups=by_keep[keep]) for c, keep in weak.items()}
    return recipes
