"""For how many coordinates a robust average withstands a liar, by the settings of a run alone."""

from __future__ import annotations

import logging

import torch

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.aggregation.robust import FEWEST, undefended
from fed_diffusion.build import Setup
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.plan import able, plan_round
from fed_diffusion.server.policy_of import policy_of

logger = logging.getLogger(__name__)


def warn_of_undefended(setup: Setup) -> None:
    """Say how much of the network one lying client decides on, if any.

    Parameters
    ----------
    setup
        Of a run whose round.aggregation is one of `ROBUST`.
    """
    share, clients = undefended_share(setup)
    if share > 0:
        logger.warning(
            "round.aggregation = %r withstands lying clients where %d or more have trained a "
            "coordinate. In a round of %d clients about %.0f %% of the coordinates have one or two "
            "trainers: there one liar decides. More clients, larger keep ratios or pruning.kind = "
            "balanced raise their number; `undefended` in metrics.jsonl counts them each round.",
            setup.config.round.aggregation,
            FEWEST,
            clients,
            100 * share,
        )


def undefended_share(setup: Setup) -> tuple[float, int]:
    """The part of the coordinates that one or two clients of a first round train, and its clients.

    The masks are those of round 1 on values drawn at random. Where the nodes say their keep ratios,
    nothing is known yet, and the part is 0.
    """
    config, family, layout = setup.config, setup.family, setup.layout
    known = setup.known_ratios()
    trains = able(config.pruning, known)
    asked = policy_of(config).ask(1, trains, len(trains)) if trains else []
    keeps = {client: known[client] for client in asked}
    if not keeps or sum(keep == 1 for keep in keeps.values()) >= FEWEST:
        return 0.0, len(keeps)
    noise = torch_generator(config.seed, Purpose.PROBE)
    theta = {n: torch.randn(tuple(v.shape), generator=noise) for n, v in setup.shapes.items()}
    coverage = Coverage(theta, len(keeps))
    for recipe in plan_round(family, config.pruning.kind, 1, keeps, theta, layout).values():
        coverage.add(derive(family, recipe, theta, layout))
    total = sum(value.numel() for value in theta.values())
    return undefended(coverage.trainers()) / total, len(keeps)
