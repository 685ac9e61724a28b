"""Updates that must not count, and whose fault that is."""

from __future__ import annotations

from typing import Literal

Fault = Literal["node", "server", "network", "nobody"]
"""Whose fault it is that an update does not count.

A node's fault counts towards round.ban_after: what the node sent is wrong, or its ClientApp fails
where others' work. The server's fault is a limit of its own. The network's fault is a reply that
did not come or was lost on its way. It is nobody's fault that an update came after enough others.
"""


class UpdateError(ValueError):
    """The update must not count; the message says what is wrong with it.

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
    """The update is refused for a limit of the server's, which its client cannot know."""

    strike = False


class RangeError(LimitError):
    """Values are beyond an update's share of the sums' range, which a lone client could have
    sent.
    """

    diverged = True


class DivergedError(UpdateError):
    """Values or losses are not finite, or so large that training has diverged.

    Attributes
    ----------
    first
        The loss at theta_r itself, before the first local step, where the worker has said it.
    """

    diverged = True

    def __init__(self, what: str, first: float | None = None):
        super().__init__(what)
        self.first = first


class ForgottenError(UpdateError):
    """A client does not know the attempt at a secure sum that a message is of.

    Its node was started again, or a message that came late has put an old memory in the place of a
    newer one. A node that only says so gains no more than one that says nothing.
    """

    strike = False
