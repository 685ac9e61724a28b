"""The ledger of a run: what each round has cost, and what its clients' losses say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fed_diffusion.aggregation.named import ROBUST
from fed_diffusion.aggregation.robust import undefended
from fed_diffusion.build import Setup
from fed_diffusion.protocol.divergence import exploded
from fed_diffusion.protocol.errors import DivergedError
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.server.divergence import round_losses, warn_if_worse
from fed_diffusion.server.open_round import OpenRound
from fed_diffusion.store.ledger import RoundSummary


@dataclass
class _Spent:
    """What earlier attempts at the same round have cost, and why updates did not count."""

    bytes_up: int = 0
    bytes_down: int = 0
    counted: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)


class Ledger:
    """The ledger writes the summaries of rounds.

    Attributes
    ----------
    losses
        The losses of the rounds so far, with which a client's loss is compared.
    """

    def __init__(self, setup: Setup, parameters: int):
        self._config = setup.config
        self._parameters = parameters
        self._Z, self._d = setup.Z, setup.d
        self.losses: list[float] = []
        self._lowest: list[float] = []
        """The lowest loss or held-out loss since this process began, if any."""
        self._warned = False
        self._failed = _Spent()
        self._late = 0

    def check_loss(self, loss: float) -> None:
        """Compare a loss with earlier rounds alone: no verdict depends on who came first in this
        one.

        Under privacy there is no check, since what one client says must not decide whether another
        counts.

        Raises
        ------
        DivergedError
            The loss is beyond all that honest training makes.
        """
        if self._config.privacy.clip is not None:
            return
        if self.losses and exploded(loss, lowest := min(self.losses)):
            raise DivergedError(
                f"its training diverged: its loss is {loss:.4g}, and the lowest of a round was "
                f"{lowest:.4g}",
                loss,
            )

    def spoiled(self, first: float | None) -> bool:
        """Return whether a loss at theta_r, before any step, says that theta_r is worth nothing."""
        return first is not None and bool(self.losses) and exploded(first, min(self.losses))

    def late(self) -> None:
        """Note a reply to a round that is closed."""
        self._late += 1

    def give_up(self, state: OpenRound) -> None:
        """Keep what an attempt has cost in the ledger of the round."""
        self._failed.bytes_up += state.bytes_up
        self._failed.bytes_down += state.bytes_down
        self._failed.counted += len(state.clients)
        self._failed.rejected += state.rejected

    def close(
        self,
        state: OpenRound,
        round: int,
        *,
        clock: float,
        banned: list[int],
        theory: dict[str, Any] | None,
    ) -> RoundSummary:
        """Return the summary of a round that has been averaged."""
        failed, self._failed = self._failed, _Spent()
        late, self._late = self._late, 0
        clients = sorted(state.clients, key=lambda c: c.client)
        rejected = failed.rejected + sorted(state.rejected, key=lambda r: r["client"])
        sent = len(clients) + failed.counted
        sent += sum(entry["client"] not in state.absent for entry in rejected)
        loss, heldout, outliers = round_losses(clients, round)
        loss = self._note(loss, heldout, round)
        trainers = state.mean.coverage.trainers()
        gamma, w2_max = min(trainers), max((c.w2 for c in clients), default=0.0)
        return RoundSummary(
            round=round,
            loss=loss,
            holdout_loss=heldout,
            dsm_objective=loss * self._Z * self._d,
            gamma=gamma,
            trained=1 - trainers.get(0, 0) / self._parameters,
            w2_max=w2_max,
            w2_n_over_gamma=w2_max * len(clients) / gamma if gamma else None,
            bytes_up=failed.bytes_up + state.bytes_up,
            bytes_down=failed.bytes_down + state.bytes_down,
            dense_bytes=4 * self._parameters * sent,
            images=sum(c.images for c in clients),
            eta=eta_of(self._config.local, self._config.rounds, round),
            clients=clients,
            rejected=rejected,
            staleness=state.staleness,
            clock=clock if self._config.round.pace else None,
            late=late,
            banned=banned,
            absent=state.absent,
            refused=state.refused,
            outliers=outliers,
            coverage={str(count): coordinates for count, coordinates in trainers.items()},
            withheld=state.withheld,
            undefended=self._undefended(trainers),
            theory=theory,
            adapter_gap=state.gap.measured(),
        )

    def _undefended(self, trainers: dict[int, int]) -> int | None:
        return undefended(trainers) if self._config.round.aggregation in ROBUST else None

    def _note(self, loss: float | None, heldout: float | None, round: int) -> float:
        """Return the loss that stands for the round; warn once where it is far above earlier ones.

        Under privacy a round may have no clients: then the last loss stands for it.
        """
        if loss is None:
            return self.losses[-1] if self.losses else 0.0
        now = [loss] if heldout is None else [loss, heldout]
        if not self._warned:
            self._warned = warn_if_worse(now, self._lowest, round, self._config.local.eta)
        self._lowest = [min(self._lowest + now)]
        self.losses.append(loss)
        return loss
