"""A round policy of the user's own: half of the clients in each round, in turn.

    fed-diffusion run digits --set round.mode=examples.own_policy:Turns

The contract is `fed_diffusion.RoundPolicy`: who is asked, when a round closes, and which weight an
update has. It keeps nothing between calls, so that a resumed run goes on as it would have gone on.
"""

from __future__ import annotations

from fed_diffusion.config import Config


class Turns:
    """This policy asks the next half of the free clients in each round, and waits for all of
    them.
    """

    overlapping = False
    """A task ends with its round."""

    def __init__(self, config: Config):
        self.needed = config.round.quorum

    def target(self, eligible: int) -> int:
        return max(1, eligible // 2)

    def quorum(self, eligible: int) -> int:
        """Return 1, as one update is enough to go on with, unless round.quorum is a count."""
        return min(self.target(eligible), self.needed if isinstance(self.needed, int) else 1)

    def ask(self, round: int, free: list[int], eligible: int) -> list[int]:
        count = min(self.target(eligible), len(free))
        first = (round - 1) * count % max(1, len(free))
        return sorted((free + free)[first : first + count])

    def weight(self, staleness: int) -> float:
        return 1.0
