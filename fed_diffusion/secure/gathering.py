"""The server's half of one attempt at secure aggregation: it routes what it cannot read, and adds.

The sums take the memory of one model, whatever the number of clients: a vector is added to them
when it comes, and dropped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fed_diffusion.config.secure import SecureConfig
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.errors import DivergedError, LimitError, RangeError, UpdateError
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import encode_bits
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.graph import degree_of
from fed_diffusion.secure.keys import SIZE, KeyPair
from fed_diffusion.secure.masking import Openings, parted
from fed_diffusion.secure.opening import Fault, Opening, Sealed, Unopened, disputed
from fed_diffusion.secure.plan import Member, Plan, mask_digest
from fed_diffusion.secure.shamir import SHARE
from fed_diffusion.secure.words import tensor_of, with_numbers, words_of


@dataclass
class Gathering:
    """One attempt at a round, from keys to sums.

    Attributes
    ----------
    theta
        theta_r; only names and shapes count.
    masks_of
        The masks of a client, derived or from what the server has kept of them.
    workers, heaviest
        See `aggregation.update.Room`.
    shared
        Whether the clients' optimiser's state is summed, too.
    weights
        The clients whose vector is in the sums, with their weights.
    faults
        Who did not keep to the protocol, as far as it came out.
    """

    round: int
    settings: SecureConfig
    theta: Mapping[str, Tensor]
    recipes: Mapping[int, Recipe]
    masks_of: Callable[[int], Masks]
    workers: int
    heaviest: int
    shared: bool = False
    weights: dict[int, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._keys: dict[int, bytes] = {}
        self._sealed: dict[int, Sealed] = {}
        self._complaints: dict[int, set[int]] = defaultdict(set)
        self._odd: dict[int, set[int]] = defaultdict(set)
        """Client -> its neighbours that it has told of another plan."""
        self._shares: dict[int, dict[int, bytes]] = {}
        self._plan: Plan | None = None
        self._openings: Openings | None = None
        self._bits: dict[str, dict[str, bytes]] = {}
        self.theta = theta = with_numbers(self.theta, self.settings.losses == "summed")
        self._sums = {
            word: torch.zeros(theta[tensor_of(word)].shape, dtype=torch.int64)
            for word in words_of(theta, self.shared)
        }

    @property
    def plan(self) -> Plan:
        """What the members agree on, once their keys are there."""
        assert self._plan is not None
        return self._plan

    def clients(self, stage: m.Stage) -> list[int]:
        """Return who takes part in an exchange: those who were there in the one before."""
        before: Mapping[m.Stage, Mapping[int, object]] = {
            m.Stage.KEYS: self.recipes,
            m.Stage.SHARES: self._keys,
            m.Stage.VECTORS: self._sealed,
            m.Stage.OPEN: self.weights,
        }
        return sorted(before[stage])

    # --- keys, and shares of secrets ------------------------------------------------------------

    def take_keys(self, update: Update) -> None:
        """Note a client's public keys."""
        self._keys[update.client] = _keys_of(update)

    def agree(self) -> None:
        """Make the plan of those whose keys are there.

        Raises
        ------
        Unopened
            They are fewer than a sum must have.
        """
        _check_count(len(self._keys), self.settings.least, "have sent keys")
        members = []
        for client in sorted(self._keys):
            keys, masks, recipe = self._keys[client], self.masks_of(client), self.recipes[client]
            digest = mask_digest(masks)
            if recipe.needs_bits and digest not in self._bits:
                self._bits[digest] = m.bits_part(digest, encode_bits(masks))
            members.append(Member(client, keys[:SIZE], keys[SIZE:], recipe, digest))
        settings, equal = self.settings, len({member.mask for member in members}) == 1
        degree = degree_of(settings.neighbours, settings.threshold, len(members), equal)
        limits = self.workers, self.heaviest, settings.least, degree, settings.threshold
        self._plan = Plan(self.round, *limits, tuple(members))

    def share_parts(self, client: int) -> dict[str, bytes]:
        """Return what a client is told before it shares its secrets."""
        return {m.PLAN: self.plan.to_json()}

    def shares_size(self, client: int) -> int:
        """Return the bytes of a client's sealed shares, and of hashes of them and of its seeds."""
        plan, holders = self.plan, len(self.plan.holders(client))
        hashes = SIZE * (plan.levels + holders * plan.secrets)
        return (holders - 1) * m.sealed_size(plan) + hashes

    def take_shares(self, update: Update) -> None:
        """Note a client's sealed shares, to be passed on."""
        self._sealed[update.client] = _sealed_of(self.plan, update)

    # --- masked vectors -------------------------------------------------------------------------

    def meet(self) -> None:
        """Close the group that shares masks: those whose sealed shares are there.

        Raises
        ------
        Unopened
            They are fewer than a sum must have.
        """
        _check_count(len(self._sealed), self.settings.least, "have shared their secrets")
        masks = (self.masks_of(client) for client in sorted(self._sealed))
        self._openings = Openings(self.theta, self.plan, masks, self.shared)

    def vector_parts(self, client: int) -> dict[str, bytes]:
        """Return what a client is sent beside its task: who is there, shares, and mask bits."""
        plan, here = self.plan, sorted(self._sealed)
        senders = [self._sealed[o] for o in plan.neighbours[client] if o in self._sealed]
        parts = {
            m.HERE: json.dumps(here).encode(),
            m.SEALED_SHARES: b"".join(sender.packets[client] for sender in senders),
            m.HASHES: b"".join(sender.hashes[client] for sender in senders),
        }
        mine = plan.by_client[client].mask
        needed = {plan.by_client[other].mask for other in here} - {mine, ""}
        for digest in needed & self._bits.keys():
            parts |= self._bits[digest]
        return parts

    def most(self, client: int) -> int:
        """Return the bytes of a client's vector."""
        assert self._openings is not None
        part = self._openings.of(self.masks_of(client))
        return 8 * sum(part.sent[tensor_of(word)].count for word in part.words)

    def take_vector(self, update: Update, weight: int, masks: Masks) -> None:
        """Add a client's masked vector to the sums.

        Raises
        ------
        UpdateError
            There is none, or it is of another length; nothing has been added.
        """
        neighbours = set(self.plan.neighbours[update.client])
        _check_fault(update, self._odd, neighbours)
        assert self._openings is not None
        part = self._openings.of(masks)
        complaints = set(m.clients_of(update, m.COMPLAINTS))
        try:
            vector = parted(m.part_of(update, m.VECTOR), part.blank())
        except ValueError as error:
            raise UpdateError(str(error)) from error
        part.scatter(vector, self._sums)
        self.weights[update.client] = weight
        for owner in complaints & neighbours:
            self._complaints[owner].add(update.client)

    def name_odd(self) -> None:
        """Name who has told others of another plan than the one that everybody was sent."""
        for owner, others in self._odd.items():
            what = "another plan of the round"
            self.faults += disputed(owner, others, len(self.plan.neighbours[owner]), what)

    # --- opening the sum ------------------------------------------------------------------------

    def level(self) -> int:
        """Return the level from which on own masks are opened; see `Plan.opened_level`."""
        return self.plan.opened_level(len(self._sealed), len(self.weights))

    def open_parts(self, client: int) -> dict[str, bytes]:
        """Return what a client is told before it gives shares of masks and keys."""
        return {m.LEFT: m.client_list(list(self.weights))}

    def take_opened(self, update: Update) -> None:
        """Note the shares that a client gives."""
        owners = [c for c in self.plan.holders(update.client) if c in self._sealed]
        data = m.part_of(update, m.OPENED, SHARE * len(owners))
        self._shares[update.client] = {
            owner: data[SHARE * i :][:SHARE] for i, owner in enumerate(owners)
        }

    def opening(self) -> Opening:
        """Return what there is of the attempt, to be opened; `PlanError` where too few are left."""
        assert self._openings is not None
        return Opening(
            self.plan,
            self._openings,
            self.masks_of,
            self._sealed,
            self.weights,
            self._shares,
            self._complaints,
            self._sums,
            self.level(),
            self.faults,
        )


def _sealed_of(plan: Plan, update: Update) -> Sealed:
    """Return a client's sealed shares, and the hashes that came with them."""
    holders, size, each = plan.holders(update.client), m.sealed_size(plan), SIZE * plan.secrets
    others = [holder for holder in holders if holder != update.client]
    packets = m.part_of(update, m.SEALED_SHARES, size * len(others))
    seeds = m.part_of(update, m.SEEDS, SIZE * plan.levels)
    hashes = m.part_of(update, m.HASHES, each * len(holders))
    return Sealed(
        {holder: packets[size * i :][:size] for i, holder in enumerate(others)},
        [seeds[SIZE * level :][:SIZE] for level in range(plan.levels)],
        {holder: hashes[each * i :][:each] for i, holder in enumerate(holders)},
    )


def _keys_of(update: Update) -> bytes:
    """Return a client's two public keys, with which every other client can agree on something."""
    keys = m.part_of(update, m.KEYS, 2 * SIZE)
    try:
        for public in keys[:SIZE], keys[SIZE:]:
            KeyPair.new().agree(public, b"a key for nothing")
    except ValueError as error:
        raise UpdateError(f"its public keys are of no use: {error}") from error
    return keys


def _check_fault(update: Update, odd: dict[int, set[int]], neighbours: set[int]) -> None:
    """Raise what a client has found of its own update or of the plan, if it sends no vector."""
    why = update.payload.numbers.get(m.FAULT)
    if why == m.OTHER_PLAN:
        others = sorted(neighbours & set(m.clients_of(update, m.COMPLAINTS)))
        for other in others:
            odd[other].add(update.client)
        raise LimitError(f"clients {others[:5]} have told it of another plan of the round")
    if why == m.DIVERGED:
        raise DivergedError("its client says that it diverged: values not finite, or huge")
    if why is not None:
        raise RangeError("its client found values beyond its share of the sums' range")


def _check_count(count: int, least: int, what: str) -> None:
    if count < least:
        raise Unopened(
            f"{count} clients {what}, and a sum of fewer than secure.least = {least} is not opened"
        )
