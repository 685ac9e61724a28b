"""How long a round waits for replies: what round.deadline_s says, or what earlier replies took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from fed_diffusion.config.federation import LONGEST_S

TIMES = 10.0
"""With round.deadline_s auto: how many times as long as the slowest update so far a round waits."""
LEAST_S = 300.0
"""With round.deadline_s auto: the least seconds that a round waits."""
DOUBLINGS = 3
"""How many times in a row a client that was missed gets twice as long as before."""


class Deadline:
    """The seconds that a round waits for an update, a function of what was noted before.

    With `auto` that is `LONGEST_S` until the first update has come; a node that does not reply is
    then missed for minutes, and not for an hour. A client whose update did not come in time gets
    twice as long the next time, `DOUBLINGS` times in a row: its machine may have become slow, and
    would otherwise never be heard again. One that never comes costs the usual time after that.

    Parameters
    ----------
    given
        round.deadline_s.
    """

    def __init__(self, given: float | Literal["auto"]):
        self._given = given
        self._slowest: float | None = None
        self._missed: Counter[int] = Counter()

    def seconds(self, clients: Iterable[int]) -> float:
        """Return how long a round that may ask these clients waits."""
        if not isinstance(self._given, str):
            return self._given
        if self._slowest is None:
            return LONGEST_S
        missed = (self._missed[client] for client in clients)
        doublings = max((times for times in missed if times <= DOUBLINGS), default=0)
        return min(LONGEST_S, max(LEAST_S, TIMES * self._slowest) * 2**doublings)

    def came(self, client: int, seconds: float) -> None:
        """Note how long a client's update took, from the beginning of its round."""
        self._slowest = max(seconds, self._slowest or 0.0)
        del self._missed[client]

    def missed(self, client: int) -> None:
        """Note that a client's update did not come in time."""
        self._missed[client] += 1
