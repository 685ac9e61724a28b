"""The vector that a client sends in the place of its update, and the others' masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.exact import fixed_point
from fed_diffusion.aggregation.stateful import parts_of
from fed_diffusion.aggregation.update import Room
from fed_diffusion.masks.mask import Masks, mask_of
from fed_diffusion.masks.spaces import Layout
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.moments import PREFIXES, decode_moments, is_shared
from fed_diffusion.protocol.wire import (
    Wire,
    decode_bits,
    decode_task,
    decode_update,
    encode_bits,
    told_masks,
)
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.keys import KeyPair
from fed_diffusion.secure.masking import Openings, flat, pair_key
from fed_diffusion.secure.noise import Share
from fed_diffusion.secure.plan import Plan, PlanError, mask_digest
from fed_diffusion.secure.words import NUMBERS, Word, summed_numbers, with_numbers

MASK_BYTES = 256 << 20
"""Bits of other members' masks that a client keeps; what is beyond is derived twice."""


@dataclass(frozen=True)
class Vectors:
    """Makes masked vectors of updates, for any client of a run.

    Attributes
    ----------
    weighting, summed
        round.weighting, and whether what the client measures is summed, too.
    wire
        How tensors travel.
    theta
        The network's parameters by name; only their shapes count.
    layout
        The network's channel spaces, where whole channels are dropped.
    noise
        What a client does for the privacy of the sums, where clients add the noise.
    """

    weighting: str
    summed: bool
    wire: Wire
    theta: Mapping[str, Tensor]
    layout: Layout | None
    noise: Share | None = None

    def begin(self, task: Task, plan: Plan) -> tuple[Masks, dict[str, Tensor]]:
        """Return a client's masks, and theta_r as far as they keep it, zero elsewhere.

        Raises
        ------
        PlanError
            The task has another mask than the plan.
        """
        parts = m.plain(task).payload, self.theta, self.layout, self.wire
        recipe, masks, start = decode_task(*parts)
        mine = plan.by_client[task.client]
        if recipe != mine.recipe or mask_digest(masks) != mine.mask:
            raise PlanError("the task has another mask than the plan")
        theta = {}
        for name, held in start.items():
            whole = torch.zeros(self.theta[name].shape)
            mask = mask_of(masks, name, whole)
            theta[name] = mask.put(mask.release(held), whole)
        return masks, theta

    def fixed(
        self, update: Update, theta: Mapping[str, Tensor], masks: Masks, plan: Plan
    ) -> dict[Word, np.ndarray]:
        """Return an update in fixed point, exactly what a server would have made of it.

        Where clients add noise, it is the update's clipped difference to theta_r, and the noise.

        Raises
        ------
        UpdateError
            The update must not count: a value is not finite, or beyond its share of the sums.
        """
        arrays, numbers = dict(update.payload.arrays), update.payload.numbers
        moments = {n: arrays.pop(n) for n in list(arrays) if n.startswith(PREFIXES)}
        values = decode_update(arrays, theta, masks, self.wire)
        room, weight = Room(plan.workers, plan.heaviest), 1
        if self.weighting == "examples":
            weight = int(numbers["examples"])  # type: ignore[arg-type]
        weight = room.check(weight)
        split = _alone
        if self.shared:
            values |= decode_moments(moments, theta, masks, self.wire.settings.state)
            split = parts_of
        if self.noise is not None:
            values = self.noise.clipped(values, theta, masks, room.scale)
        found = {
            (name, level): fixed_point(name, part, weight, room)
            for name, value in values.items()
            for level, part in enumerate(split(value))
        }
        if self.noise is not None:
            self.noise.add_to(found.values(), room.scale)
        if self.summed:
            whole = plan.equal and not plan.members[0].mask
            found[NUMBERS, 0] = summed_numbers(numbers, whole, plan.workers)
        return found

    @property
    def shared(self) -> bool:
        """Whether the optimiser's state is summed, too."""
        return is_shared(self.wire.local)

    def hidden(
        self,
        task: Task,
        plan: Plan,
        here: list[int],
        masks: Masks,
        values: Mapping[Word, np.ndarray],
        seed: bytes,
        pair: KeyPair,
    ) -> bytes:
        """Return a client's values as a vector that the masks of everybody here hide.

        Parameters
        ----------
        here
            Who shares masks, this client among them.
        seed, pair
            The client's own seed of level 0, and its key pair for shared masks.
        """
        client = task.client
        told = _Told(self, task, plan, plan.by_client[client].mask, masks)
        theta, others = with_numbers(self.theta, self.summed), map(told.masks, here)
        part = Openings(theta, plan, others, self.shared).of(masks)
        vector = part.chosen(values)
        part.add_own(vector, seed)
        for other in plan.neighbours[client]:
            if other in here:
                key = pair_key(pair, plan.by_client[other].pair, plan, client, other)
                part.add_pair(vector, told.masks(other), key, minus=other < client)
        return flat(vector)


def _alone(value: Tensor) -> list[Tensor]:
    return [value]


class _Told:
    """The masks of the members, as a client is told them; each is derived once, and kept packed."""

    def __init__(self, vectors: Vectors, task: Task, plan: Plan, mine: str, masks: Masks):
        self._vectors, self._task, self._plan = vectors, task, plan
        self._known = {mine: masks}
        self._packed: dict[str, dict[str, Packed]] = {}
        self._room = MASK_BYTES

    def masks(self, client: int) -> Masks:
        """Return a member's masks."""
        mask = self._plan.by_client[client].mask
        if mask in self._known:
            return self._known[mask]
        if mask in self._packed:
            return decode_bits(self._packed[mask], self._vectors.theta)
        found = self._derived(client)
        if all(one.bools is None for one in found.values()):
            self._known[mask] = found  # blocks and whole tensors take no memory
            return found
        packed = encode_bits(found)
        self._room -= sum(len(it.data) for it in packed.values())
        if self._room > 0:
            self._packed[mask] = packed
        return found

    def _derived(self, client: int) -> Masks:
        """Return a member's mask, of its recipe or of the bits that came with the task."""
        member, its = self._plan.by_client[client], self._vectors
        shapes = {name: tuple(value.shape) for name, value in its.theta.items()}
        bits = m.bits_of(self._task, member.mask, shapes) if member.recipe.needs_bits else {}
        masks = told_masks(member.recipe, bits, its.theta, its.layout, its.wire)
        if mask_digest(masks) != member.mask:
            raise PlanError("a neighbour's mask is another one than the plan says")
        return masks
