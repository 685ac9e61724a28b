"""Updates that must not count, and whose fault that is."""

from __future__ import annotations

from typing import Literal

Fault = Literal["node", "server", "network", "nobody"]
"""Whose fault it is that an update does not count. A node's counts towards round.ban_after: what
it sent is wrong, or its ClientApp fails where others' work. The server's is a limit of its own.
The network's is what did not come or was lost on its way. Nobody's is an update that came after
enough others."""


class UpdateError(ValueError):
    """An update that must not count; the message says what is wrong with it.

    Attributes
    ----------
    strike
        Whether its client is at fault, and may be banned for it.
    diverged
        Whether its client's training has diverged, as with too large a step size.
    """

    strike = True
    diverged = False


class LimitError(UpdateError):
    """An update that is refused for a limit of the server's, which its client cannot know."""

    strike = False


class RangeError(LimitError):
    """Values beyond an update's share of the sums' range, which a lone client could have sent."""

    diverged = True


class DivergedError(UpdateError):
    """An update whose values or losses are not finite, or so large that training has diverged.

    Attributes
    ----------
    first
        The loss at theta_r itself, before the first local step, where the worker has said it.
    """

    diverged = True

    def __init__(self, what: str, first: float | None = None):
        super().__init__(what)
        self.first = first
