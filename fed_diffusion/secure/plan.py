"""What a round's members agree on: their keys, their masks, and who shares masks with whom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.wire import encode_bits
from fed_diffusion.secure.graph import needed_of, neighbours_of
from fed_diffusion.secure.keys import SIZE


class PlanError(ValueError):
    """What a server says of a round is not what was agreed on; the client takes no part."""


@dataclass(frozen=True)
class Member:
    """One client of an attempt at a round.

    Attributes
    ----------
    seal, pair
        Its public keys: for messages that only one neighbour may read, and for shared masks.
    recipe
        Its mask's.
    mask
        `mask_digest` of that mask.
    """

    client: int
    seal: bytes
    pair: bytes
    recipe: Recipe
    mask: str


@dataclass(frozen=True)
class Plan:
    """An attempt at a round, as every member is told it; the neighbours follow from it.

    Attributes
    ----------
    workers, heaviest
        See `aggregation.update.Room`.
    least
        Sums of fewer members than this are not opened.
    degree
        How many neighbours a member has.
    threshold
        More than this part of a member's shares is needed to open anything of it.
    members
        In the order of their numbers.
    """

    round: int
    workers: int
    heaviest: int
    least: int
    degree: int
    threshold: float
    members: tuple[Member, ...]

    def to_json(self) -> bytes:
        """The plan as it travels; the same plan has the same bytes."""
        members = [
            [m.client, m.seal.hex(), m.pair.hex(), m.recipe.to_metrics(), m.mask]
            for m in self.members
        ]
        head = [self.round, self.workers, self.heaviest, self.least, self.degree, self.threshold]
        return json.dumps([*head, members], separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Plan:
        """The inverse of `to_json`; raises `PlanError` where it is no plan."""
        try:
            round, workers, heaviest, least, degree, threshold, members = json.loads(text)
            found = tuple(_member(*entry) for entry in members)
            limits = int(workers), int(heaviest), int(least), int(degree), float(threshold)
            plan = cls(int(round), *limits, found)
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise PlanError(f"the plan of the round cannot be read: {error!r}") from error
        clients = [member.client for member in plan.members]
        if clients != sorted(set(clients)) or plan.least < 1 or plan.degree < 1:
            raise PlanError("the plan of the round names a client twice, or limits that are none")
        if not 0.5 <= plan.threshold < 1:
            raise PlanError(f"the plan's threshold is {plan.threshold}, not from 0.5 to below 1")
        return plan

    @cached_property
    def digest(self) -> bytes:
        """The hash of all of it; members compare it, and their keys are for this plan alone."""
        return hashlib.sha256(b"fed-diffusion secure 1" + self.to_json()).digest()

    @cached_property
    def by_client(self) -> dict[int, Member]:
        """Client -> what is known of it."""
        return {member.client: member for member in self.members}

    @cached_property
    def neighbours(self) -> dict[int, list[int]]:
        """Client -> its neighbours. Their order follows from all public keys, so nobody sets it."""
        return neighbours_of(list(self.by_client), self.degree, self.digest)

    def holders(self, client: int) -> list[int]:
        """Who holds a share of a client's secrets: its neighbours, and the client itself."""
        return sorted([client, *self.neighbours[client]])

    def needed(self, client: int) -> int:
        """How many shares open a secret of a client."""
        return needed_of(len(self.holders(client)), self.threshold)

    @cached_property
    def equal(self) -> bool:
        """Whether all members have the same mask."""
        return len({member.mask for member in self.members}) == 1

    @cached_property
    def levels(self) -> int:
        """How many seeds a client's own mask has: one for each number of members that there can be
        behind a coordinate, from `least` on.

        One is enough where all coordinates have the same number, or where every one may be opened.
        """
        if self.equal or self.least == 1:
            return 1
        return max(1, len(self.members) - self.least + 1)

    @property
    def secrets(self) -> int:
        """How many secrets a client shares: its key for shared masks, and every seed."""
        return 1 + self.levels

    def opened_level(self, here: int, survivors: int) -> int:
        """The level from which on own masks are opened when so many of `here` members are left.

        Raises
        ------
        PlanError
            Fewer are left than a sum must have.
        """
        if survivors < self.least:
            raise PlanError(
                f"{survivors} updates are left, and a sum of fewer than secure.least = "
                f"{self.least} is not opened"
            )
        return 0 if self.levels == 1 else here - survivors


def _member(client: int, seal: str, pair: str, recipe: Mapping[str, Any], mask: str) -> Member:
    keys = bytes.fromhex(seal), bytes.fromhex(pair)
    if any(len(key) != SIZE for key in keys) or not isinstance(mask, str):
        raise ValueError(f"the keys of client {client} are none")
    return Member(int(client), *keys, Recipe.from_metrics(recipe), mask)


def mask_digest(masks: Masks) -> str:
    """A hash of what masks keep; empty where they keep everything."""
    packed = encode_bits({name: mask for name, mask in masks.items() if not mask.whole})
    if not packed:
        return ""
    whole = hashlib.sha256()
    for name in sorted(packed):
        whole.update(f"{name} {packed[name].shape} ".encode())
        whole.update(packed[name].data)
    return whole.hexdigest()
