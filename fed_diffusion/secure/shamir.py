"""Shamir's secret sharing of 32-byte secrets: any `needed` shares give the secret, fewer nothing.

Sharing is over the integers modulo the smallest prime above 2^256, so that a whole key is one
number of the field. Flower's helpers share over 16-byte blocks through a package that this
project does not have.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fed_diffusion.secure.keys import SIZE

PRIME = 2**256 + 297
SHARE = 33
"""Bytes of a share."""


def split(secret: bytes, shares: int, needed: int) -> list[bytes]:
    """Shares of a secret, for the places 1, 2, ...; the polynomial is from the system's entropy."""
    if len(secret) != SIZE or not 1 <= needed <= shares:
        raise ValueError(f"{needed} of {shares} shares of {len(secret)} bytes cannot be made")
    factors = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(needed - 1))]
    return [_value(factors, place).to_bytes(SHARE) for place in range(1, shares + 1)]


def _value(factors: list[int], place: int) -> int:
    value = 0
    for factor in reversed(factors):
        value = (value * place + factor) % PRIME
    return value


def at(shares: Mapping[int, bytes], place: int) -> int:
    """The value at a place of the polynomial that goes through the shares, by Lagrange."""
    total = 0
    for here, share in shares.items():
        above = below = 1
        for other in shares:
            if other != here:
                above = above * (place - other) % PRIME
                below = below * (here - other) % PRIME
        total += int.from_bytes(share) * above * pow(below, -1, PRIME)
    return total % PRIME


def join(shares: Mapping[int, bytes], needed: int) -> bytes | None:
    """Return the secret of so many of the shares; None where the shares give no such secret.

    Parameters
    ----------
    shares
        Place -> share, at least `needed` of them.
    """
    secret = at({place: shares[place] for place in sorted(shares)[:needed]}, 0)
    return secret.to_bytes(SIZE) if secret < 2 ** (8 * SIZE) else None
