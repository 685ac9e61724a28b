"""Round policies: who is asked, when a round closes, and which weight an update has.

`round.mode` names the policy of a run: one of `POLICIES`, or module:Class for a `RoundPolicy` of
the user's. The coordinator asks the policy, and the exchange loop of either engine follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from fed_diffusion.aggregation.private import drawn
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.config import Config


class RoundPolicy(Protocol):
    """A round policy says who is asked, when a round closes, and which weight an update has.

    A policy is made once for each run, by `Policy(config)`. What it answers follows from its
    arguments and the configuration alone, so that a resumed run goes on as it would have gone on.

    Attributes
    ----------
    overlapping
        Whether a task may outlive its round. If not, a round asks once, and what has not come when
        it closes counts as rejected. If so, a client is asked again as soon as theta has moved
        since its last task, and its update counts in the round in which it arrives. That needs
        wire.differences, since theta may have moved while the client trained.
    """

    overlapping: bool

    def target(self, eligible: int) -> int:
        """Return how many updates close a round, where so many clients may take part."""
        ...

    def quorum(self, eligible: int) -> int:
        """Return how many updates a round must have to count at all; at most the target."""
        ...

    def ask(self, round: int, free: list[int], eligible: int) -> list[int]:
        """Return which clients get a task now.

        Parameters
        ----------
        free
            The eligible clients that can be reached and may be asked, in ascending order.
        eligible
            How many clients may take part, wherever they are.
        """
        ...

    def weight(self, staleness: int) -> float:
        """Return the factor on an update's difference to theta, which has moved so often
        meanwhile.
        """
        ...


class Synchronous:
    """A draw of the clients is asked, and a round closes when all updates that it wants are in.

    The draw is round.fraction of the eligible clients by the run's seed, and round.over_select
    more. Under privacy each client is drawn independently, from the operating system's entropy.
    """

    overlapping = False

    def __init__(self, config: Config):
        self._settings = config.round
        self._seed = config.seed
        self._private = config.privacy.clip is not None

    def target(self, eligible: int) -> int:
        """Return the part round.fraction of the eligible clients, at least one."""
        return max(1, math.floor(self._settings.fraction * eligible + 0.5))

    def quorum(self, eligible: int) -> int:
        """Return what round.quorum says, as a count or as a part of the target."""
        return quorum_of(self._settings.quorum, self.target(eligible))

    def ask(self, round: int, free: list[int], eligible: int) -> list[int]:
        """Draw clients without replacement."""
        if self._private:
            return drawn(free, self._settings.fraction)
        count = math.ceil(self.target(eligible) * (1 + self._settings.over_select))
        if count >= len(free):
            return free
        draw = generator(self._seed, Purpose.PARTICIPATION, round)
        return sorted(int(c) for c in draw.choice(free, count, replace=False))

    def weight(self, staleness: int) -> float:
        """Return 1: theta does not move while a client trains, so every difference counts whole."""
        return 1.0


class Buffered:
    """Buffered asynchronous rounds (FedBuff) with masks: fast workers do not wait for slow ones.

    Theta moves whenever round.buffer updates are in, and every client is asked again as soon as it
    is free. With Delta_k the difference that worker k made, and s_k how many times theta changed
    while it trained,

        theta^i <- theta^i + (1 / |N^i|) sum over N^i of Delta_k^i / (1 + s_k)^a,

    where N^i are the workers of the buffer that trained coordinate i. As in FedBuff (Nguyen et al.
    2022) the sum is divided by the number of updates, not by the sum of their factors, so that an
    update that stands alone is damped too. With round.weighting: examples each update counts as
    often, above and below, as its worker has images. With a buffer of all workers nobody is ever
    stale, and this is the synchronous round, to the bit.
    """

    overlapping = True

    def __init__(self, config: Config):
        self._buffer = config.round.buffer
        self._damping = config.round.staleness
        self._quorum = config.round.quorum

    def target(self, eligible: int) -> int:
        """Return the number of updates behind a move of theta: round.buffer, or one of every
        client.
        """
        return max(1, min(self._buffer or eligible, eligible))

    def quorum(self, eligible: int) -> int:
        """Return round.quorum, for a buffer that stays short as everybody has answered or failed.

        A client that has failed is asked again when theta has moved. With a buffer of all clients,
        theta and that client would otherwise wait for each other.
        """
        return quorum_of(self._quorum, self.target(eligible))

    def ask(self, round: int, free: list[int], eligible: int) -> list[int]:
        """Return all free clients."""
        return free

    def weight(self, staleness: int) -> float:
        """Return the factor 1 / (1 + s)^a."""
        return (1 + staleness) ** -self._damping


def quorum_of(quorum: int | float, target: int) -> int:
    """Return round.quorum as a number of updates: a count, or a part of the target."""
    wanted = quorum if isinstance(quorum, int) else math.ceil(quorum * target)
    return min(wanted, target)


POLICIES: dict[str, Callable[[Config], RoundPolicy]] = {
    "synchronous": Synchronous,
    "buffered": Buffered,
}
"""The built-in policies, by their names in `round.mode`."""
