"""The recipe of every participant of a round, given the participants' keep ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fed_diffusion.common.plugins import blamed
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.config import ConfigError
from fed_diffusion.config.names import is_own
from fed_diffusion.config.schema import PruningConfig
from fed_diffusion.masks.families import KEY, Family
from fed_diffusion.masks.families.check import check_family, check_plan
from fed_diffusion.masks.levels import keep_ratios
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.masks.spaces import Layout


def known_ratios(pruning: PruningConfig, clients: int) -> dict[int, float]:
    """Client -> keep ratio, as far as the configuration knows it; else the nodes say it."""
    if pruning.budget != "level":
        return {}
    if pruning.baseline == "small":  # everyone trains the whole of a small network
        return dict.fromkeys(range(clients), 1.0)
    return dict(enumerate(keep_ratios(pruning, clients)))


def able(pruning: PruningConfig, keeps: Mapping[int, float]) -> list[int]:
    """The clients that may train: all, or under the baseline `exclusive` those that keep it all.

    Parameters
    ----------
    keeps
        Client -> keep ratio.
    """
    alone = pruning.baseline == "exclusive"
    return [client for client, keep in sorted(keeps.items()) if keep == 1 or not alone]


def check_pruning(pruning: PruningConfig, clients: int, layout: Layout | None) -> None:
    """Refuse ratios that cannot be used.

    Raises
    ------
    ConfigError
        A ratio is below the smallest sub-network, or a baseline has no weak or no strong worker.
    """
    known = {"level": keep_ratios(pruning, clients), "node": (), "auto": pruning.ladder}
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


def check_own_family(
    family: Family,
    pruning: PruningConfig,
    clients: int,
    seed: int,
    parameters: Mapping[str, Tensor],
    layout: Layout | None,
) -> None:
    """Try a user's mask family on values of the network's shapes, or refuse the family.

    Parameters
    ----------
    parameters
        The network's parameters by name; only their shapes count.

    Raises
    ------
    ConfigError
        The family breaks the contract; the message says how.
    """
    if not is_own(pruning.kind):
        return
    if pruning.budget == "auto" and not family.shrinks:
        raise ConfigError(
            "pruning.budget = 'auto' needs masks that save memory and time, and those of "
            f"pruning.kind = {pruning.kind!r} do not (shrinks = False); use level or node."
        )
    known = {"level": keep_ratios(pruning, clients), "node": (0.5,), "auto": pruning.ladder}
    weak = sorted({keep for keep in known[pruning.budget] if keep < 1})
    noise = torch_generator(seed, Purpose.PROBE)
    theta = {n: torch.randn(tuple(v.shape), generator=noise) for n, v in parameters.items()}
    keeps = dict(enumerate(keep for keep in weak[:2] for _ in range(2)))
    if keeps:
        with blamed(KEY, pruning.kind):
            check_family(family, pruning.kind, keeps, theta, layout)


def plan_round(
    family: Family,
    kind: str,
    round: int,
    keeps: Mapping[int, float],
    theta: Mapping[str, Tensor],
    layout: Layout | None = None,
) -> dict[int, Recipe]:
    """Return the recipe of every participant; a keep ratio of 1 means the whole network.

    Parameters
    ----------
    family, kind
        The run's mask family, and its name: pruning.kind.
    keeps
        Participant -> keep ratio.
    theta
        theta_r, which magnitudes are taken from.
    layout
        The network's channel spaces, where whole channels are dropped.

    Raises
    ------
    ConfigError
        A user's family has failed, or has planned for other clients than those it was given.
    """
    whole = {client: Recipe(round=round, client=client) for client in keeps}
    weak = {client: keep for client, keep in keeps.items() if keep != 1}
    if not weak:
        return whole
    if not is_own(kind):
        made = family.plan(round, weak, theta, layout)
    else:
        with blamed(KEY, kind):
            made = family.plan(round, weak, theta, layout)
            check_plan(made, kind, round, weak)
    bits = {c: replace(recipe, needs_bits=family.sends_bits) for c, recipe in made.items()}
    return {client: bits.get(client, recipe) for client, recipe in whole.items()}
