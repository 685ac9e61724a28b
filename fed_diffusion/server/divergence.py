"""How training that has diverged shows, and a round's loss that no single client decides."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fed_diffusion.protocol.divergence import LEAST

if TYPE_CHECKING:
    from fed_diffusion.server.open_round import OpenRound
    from fed_diffusion.store.ledger import ClientRound

OUTLIER = 10.0
"""A client's loss above so many times the round's median is left out of the round's loss."""
WORSE = 3.0
"""A round's loss so many times the lowest so far is worth a warning."""
logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The training of most clients diverged; the message names the round and the step size.

    Attributes
    ----------
    spoiled
        Whether most of them found theta worthless before they made a step: the round before has
        made it so.
    """

    def __init__(self, what: str, spoiled: bool = False):
        super().__init__(what)
        self.spoiled = spoiled


def warn_if_worse(now: Iterable[float], before: Iterable[float], round: int, eta: float) -> bool:
    """Warn where training undoes what was reached, and return whether it does.

    Parameters
    ----------
    now
        The round's loss, and held-out loss of the theta that it began with, if any.
    before
        The losses and held-out losses of earlier rounds.
    """
    figures = list(now)
    highest, lowest = max(figures), min([*figures, *before])
    if highest <= WORSE * max(lowest, LEAST):
        return False
    logger.warning(
        "round %d: the loss is %.4g, and was %.4g before: training makes it worse. The step size "
        "local.eta = %g may be too large; a tenth of it is --set local.eta=%g",
        *(round, highest, lowest, eta, eta / 10),
    )
    return True


def usual_mean(losses: Mapping[int, float], round: int, what: str) -> tuple[float, list[int]]:
    """Return the mean of the clients' losses without outliers, and the clients of the outliers.

    Outliers are above `OUTLIER` times the median (the lower one of two in the middle). What a
    client says of itself cannot be checked, and a single lie could make a mean over all arbitrary.
    """
    limit = OUTLIER * statistics.median_low(losses.values())
    outliers = sorted(client for client, loss in losses.items() if loss > limit)
    for client in outliers:
        logger.warning(
            "round %d: client %d reports a %s of %.4g, over %g times the median; it is left out of "
            "the round's",
            *(round, client, what, losses[client], OUTLIER),
        )
    usual = [losses[client] for client in sorted(losses) if client not in outliers]
    return sum(usual) / len(usual), outliers


def round_losses(
    clients: list[ClientRound], round: int
) -> tuple[float | None, float | None, list[int]]:
    """Return a round's loss and held-out loss, and the clients whose losses are left out of them.

    Both are None without any. Only workers with the whole network measure theta_r itself on their
    held-out images.
    """
    whole = {c.client: c.holdout_loss for c in clients if c.kind == "full"}
    held_out = {client: loss for client, loss in whole.items() if loss is not None}
    if not clients:
        return None, None, []
    loss, outliers = usual_mean({c.client: c.loss for c in clients}, round, "loss")
    if not held_out:
        return loss, None, outliers
    mean, more = usual_mean(held_out, round, "held-out loss")
    return loss, mean, sorted({*outliers, *more})


def check_divergence(eta: float, now: float, round: int, needed: int, state: OpenRound) -> None:
    """Raise `Diverged` where divergence, not absence or lies, keeps a round from its quorum.

    Parameters
    ----------
    eta, now
        local.eta, and the step size that it means in this round.
    needed
        The updates without which the round is not closed.
    """
    diverged, counted, asked = len(state.diverged), len(state.clients), len(state.asked)
    if diverged <= counted or diverged + counted < needed or 2 * diverged < asked:
        return
    first = next(entry for entry in state.rejected if entry["client"] in state.diverged)
    in_round = f" ({now:g} in this round)" if now != eta else ""
    raise Diverged(
        f"round {round} diverged: of {asked} clients {diverged} did not end with finite, plausible "
        f"values (client {first['client']}: {first['reason']}). The step size is too large: "
        f"local.eta = {eta:g}{in_round}. Try a tenth of it: --set local.eta={eta / 10:g}.",
        spoiled=2 * len(state.spoiled) > diverged,
    )
