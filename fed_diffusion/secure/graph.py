"""Who shares masks with whom: a regular graph of a round, random by a public seed.

It is a circle of the clients in random order, in which each one has the k/2 next to it on either
side as neighbours (Bell et al. 2020, section 3). What can go wrong with it has a probability that
`failure` bounds, for clients that are lost or collude independently of the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

FEW = 32
"""Up to so many clients all are neighbours."""
FAILURE = 2.0**-40
"""The most probable failure of a graph that is chosen by itself."""
COLLUDING, LOST = 0.1, 0.2
"""The parts of the clients for which a graph is chosen: those who collude with the server, and
those who vanish in a round."""


def neighbours_of(clients: Sequence[int], degree: int, seed: bytes) -> dict[int, list[int]]:
    """Client -> its neighbours, ascending.

    Parameters
    ----------
    degree
        How many neighbours each has: an even number, or one that makes the graph complete.
    seed
        What the order follows from; all clients know it.
    """
    order = sorted(clients, key=lambda c: hashlib.sha256(seed + c.to_bytes(8)).digest())
    if degree >= len(order) - 1:
        return {client: sorted(set(order) - {client}) for client in order}
    reach = [step for distance in range(1, degree // 2 + 1) for step in (distance, -distance)]
    return {
        client: sorted(order[(place + step) % len(order)] for step in reach)
        for place, client in enumerate(order)
    }


def needed_of(holders: int, threshold: float) -> int:
    """How many of so many shares give a secret: more than the part `threshold` of them."""
    return min(holders, math.floor(threshold * holders) + 1)


def failure(clients: int, degree: int, threshold: float, colluding: float, lost: float) -> float:
    """A bound on the probability that a random graph of this degree fails.

    It fails if as many of a client's neighbours collude as give its secrets, if so many are lost
    that nobody can unmask, or if the honest clients that are left are not connected, so that the
    server would learn the sums of parts. In the complete graph the last cannot be.
    """
    bad, gone = math.ceil(colluding * clients), math.ceil(lost * clients)
    needed = needed_of(degree + 1, threshold)
    told = _tail(clients - 1, bad, degree, needed)
    stuck = _tail(clients - 1, gone, degree, degree - needed + 1)
    apart = 0.0
    if degree < clients - 1:
        # on a circle two gaps of degree/2 or more removed clients in a row are needed
        apart = 1.0
        for place in range(degree // 2):
            apart *= max(0, bad + gone - place) / (clients - place)
    return min(1.0, clients * (told + stuck + apart))


def _tail(of: int, marked: int, drawn: int, least: int) -> float:
    """P(at least so many marked ones) in a draw without replacement."""
    marked, ways = min(marked, of), 0
    for count in range(max(least, 0), min(marked, drawn) + 1):
        ways += math.comb(marked, count) * math.comb(of - marked, drawn - count)
    return ways / math.comb(of, drawn)


def degree_of(neighbours: int | None, threshold: float, clients: int, equal: bool) -> int:
    """How many neighbours each client has.

    Under unequal masks it is all others: two clients that share no mask could be the only ones
    that keep a coordinate, and a sparse graph is connected among all, not among those.

    Parameters
    ----------
    neighbours
        As configured; None: `degree_for` says it.
    equal
        Whether all clients have the same mask.
    """
    if not equal:
        return max(clients - 1, 1)
    wanted = degree_for(clients, threshold) if neighbours is None else neighbours
    return max(1, min(wanted, clients - 1))


def degree_for(clients: int, threshold: float) -> int:
    """The smallest degree that fails with a probability of at most `FAILURE`; else all others."""
    if clients <= FEW:
        return max(clients - 1, 1)
    for degree in range(2, clients - 1, 2):
        if failure(clients, degree, threshold, COLLUDING, LOST) <= FAILURE:
            return degree
    return max(clients - 1, 1)
