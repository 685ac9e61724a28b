"""For how many coordinates a robust average withstands a liar, by the settings of a run alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.robust import FEWEST, undefended
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.config import Config
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.plan import able, known_ratios, plan_round
from fed_diffusion.masks.spaces import Layout
from fed_diffusion.server.policy_of import policy_of

logger = logging.getLogger(__name__)


def warn_of_undefended(
    config: Config, parameters: Mapping[str, Tensor], layout: Layout | None
) -> None:
    """Warn how much of the network one lying client decides on, if any.

    Parameters
    ----------
    config
        The settings of a run whose round.aggregation is one of `ROBUST`.
    parameters
        The network's parameters by name; only their shapes count.
    """
    share, clients = undefended_share(config, parameters, layout)
    if share > 0:
        logger.warning(
            "round.aggregation = %r withstands lying clients where %d or more have trained a "
            "coordinate. In a round of %d clients about %.0f %% of the coordinates have one or two "
            "trainers: there one liar decides. More clients, larger keep ratios or pruning.kind = "
            "balanced raise their number; `undefended` in metrics.jsonl counts them each round.",
            config.round.aggregation,
            FEWEST,
            clients,
            100 * share,
        )


def undefended_share(
    config: Config, parameters: Mapping[str, Tensor], layout: Layout | None
) -> tuple[float, int]:
    """Return the part of the coordinates with one or two trainers in round 1, and its clients.

    The masks are those of round 1 on values drawn at random. Where the nodes say their keep ratios,
    nothing is known yet, and the part is 0.
    """
    known = known_ratios(config)
    trains = able(config, known)
    asked = policy_of(config).ask(1, trains, len(trains)) if trains else []
    keeps = {client: known[client] for client in asked}
    if not keeps or sum(keep == 1 for keep in keeps.values()) >= FEWEST:
        return 0.0, len(keeps)
    noise = torch_generator(config.seed, Purpose.PROBE)
    theta = {n: torch.randn(tuple(v.shape), generator=noise) for n, v in parameters.items()}
    family, coverage = family_of(config.pruning, config.seed), Coverage(theta, len(keeps))
    for recipe in plan_round(config, 1, keeps, theta, layout).values():
        coverage.add(derive(family, recipe, theta, layout))
    total = sum(value.numel() for value in theta.values())
    return undefended(coverage.trainers()) / total, len(keeps)
