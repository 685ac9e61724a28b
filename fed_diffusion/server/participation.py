"""Who may take part in a run: the clients whose keep ratio is known and who are not banned."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from fed_diffusion.build import Setup
from fed_diffusion.masks.plan import able


class Participation:
    """The clients of a run, with what the server knows of each.

    Attributes
    ----------
    keeps
        Client -> keep ratio, as far as the configuration or the client's node has said it.
    images
        Client -> how many images its node said that it has, when it joined.
    strikes
        Client -> how many bad updates it has sent.
    """

    def __init__(self, setup: Setup):
        self._config = setup.config
        self._layout = setup.layout
        self.keeps = setup.known_ratios()
        self.images: dict[int, int] = {}
        self.strikes: dict[int, int] = {}

    def announce(self, client: int, keep: float) -> None:
        """Note the keep ratio that a client's node gives it (pruning.budget: node or auto)."""
        self.keeps[client] = keep

    def check(self, keep: float) -> None:
        """Refuse a keep ratio of a node that cannot be used.

        Raises
        ------
        ValueError
            The ratio is out of range, or below that of the smallest network.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"its keep = {keep:g}; it must be above 0 and at most 1")
        if self._layout is not None:
            self._layout.counts(keep)

    def heaviest(self, client: int, asked: Collection[int]) -> float:
        """Return the most images that a client may count by: as many as all others together have.

        What the others have is what their nodes said when they joined. Where fewer than two others
        are asked, or a node said nothing, as in one process, there is no limit.
        """
        others = [self.images.get(other, math.inf) for other in asked if other != client]
        return sum(others) if len(others) > 1 else math.inf

    def able(self) -> list[int]:
        """All clients but those that `exclusive` leaves out for their keep ratio."""
        return able(self._config.pruning, self.keeps)

    def eligible(self) -> list[int]:
        """Return clients that may take part: able, and not banned."""
        banned = self.banned()
        return [client for client in self.able() if client not in banned]

    def banned(self) -> list[int]:
        """Return clients that have sent round.ban_after bad updates."""
        limit = self._config.round.ban_after
        return sorted(c for c, count in self.strikes.items() if limit and count >= limit)

    def absent(self, available: Collection[int] | None) -> list[int]:
        """Return eligible clients that cannot be reached; None means that all can."""
        return [c for c in self.eligible() if available is not None and c not in available]

    def strike(self, client: int) -> None:
        """Note a bad update of a client."""
        self.strikes[client] = self.strikes.get(client, 0) + 1

    def ratios(self, clients: Iterable[int]) -> dict[int, float]:
        """Return the keep ratios of these clients."""
        return {client: self.keeps[client] for client in clients}

    def state(self) -> dict[str, int]:
        """Return the strikes, as a checkpoint holds them."""
        return {str(client): count for client, count in self.strikes.items()}

    def restore(self, strikes: Mapping[str, int]) -> None:
        """Undo `state`."""
        self.strikes = {int(client): int(count) for client, count in strikes.items()}
