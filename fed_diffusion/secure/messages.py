"""The messages of secure aggregation, as parts of the tasks and updates that every engine carries.

An attempt at a round has four exchanges: public keys; shares of secrets, sealed for each neighbour;
the task itself, and the masked vector in the place of the update; and the shares that open the sum.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any

from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import MASK_PREFIX, Payload
from fed_diffusion.secure.keys import SEALED, SIZE
from fed_diffusion.secure.plan import Plan
from fed_diffusion.secure.shamir import SHARE

PREFIX = "secure:"
"""What the names of this protocol's arrays begin with."""
STAGE, ATTEMPT, FAULT = "secure.stage", "secure.attempt", "secure.fault"
"""The numbers that say of which exchange and attempt a message is, and why a client has sent no
vector. A later attempt has a higher number, also where the run was resumed between them."""
OUT_OF_RANGE, DIVERGED, OTHER_PLAN = 1, 2, 3
"""Values are beyond the client's share, or diverged, or a neighbour was told another plan."""
KEYS, PLAN, SEALED_SHARES, SEEDS = "keys", "plan", "sealed", "seeds"
HASHES, HERE = "hashes", "here"
VECTOR, COMPLAINTS, LEFT, OPENED, BITS = "vector", "complaints", "left", "opened", "bits:"


class Stage(IntEnum):
    """The exchanges of an attempt, in order."""

    KEYS = 1
    SHARES = 2
    VECTORS = 3
    OPEN = 4


def task(
    stage: Stage,
    round: int,
    client: int,
    parts: Mapping[str, bytes],
    payload: Payload | None = None,
    attempt: int = 1,
) -> Task:
    """A message to a client, with a task's own payload where there is one."""
    return Task(round, client, _payload(stage, attempt, parts, payload))


def reply(
    stage: Stage, to: Task, parts: Mapping[str, bytes], payload: Payload | None = None
) -> Update:
    """A client's answer."""
    return Update(to.round, to.client, _payload(stage, attempt_of(to), parts, payload))


def _payload(
    stage: Stage, attempt: int, parts: Mapping[str, bytes], beside: Payload | None
) -> Payload:
    arrays = {PREFIX + k: Packed("bytes", (len(data),), data) for k, data in parts.items()}
    numbers: Numbers = {STAGE: int(stage), ATTEMPT: attempt}
    if beside is None:
        return Payload(arrays, numbers)
    return Payload(beside.arrays | arrays, beside.numbers | numbers)


def stage_of(message: Task | Update) -> Stage | None:
    """Which exchange a message is of; None where it is none of this protocol."""
    stage = message.payload.numbers.get(STAGE)
    if stage is None:
        return None
    if not isinstance(stage, int) or stage not in set(Stage):
        raise UpdateError(f"{STAGE} = {stage!r} is none of {[int(one) for one in Stage]}")
    return Stage(stage)


def attempt_of(message: Task | Update) -> int:
    """Which attempt of the run a message is of; `UpdateError` where it does not say."""
    attempt = message.payload.numbers.get(ATTEMPT)
    if type(attempt) is not int:
        raise UpdateError(f"{ATTEMPT} = {attempt!r} is not the number of an attempt")
    return attempt


def part_of(message: Task | Update, name: str, size: int | None = None) -> bytes:
    """One of this protocol's arrays; `UpdateError` where it is missing or of another size."""
    packed = message.payload.arrays.get(PREFIX + name)
    if packed is None:
        raise UpdateError(f"{PREFIX + name} is missing")
    if size is not None and len(packed.data) != size:
        raise UpdateError(f"{PREFIX + name} has {len(packed.data)} bytes, and {size} are due")
    return bytes(packed.data)


def clients_of(message: Task | Update, name: str) -> list[int]:
    """A list of clients; `UpdateError` where it is none."""
    return as_clients(part_of(message, name))


def as_clients(text: bytes) -> list[int]:
    """A list of clients in ascending order; `UpdateError` where it is none."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"a list of clients cannot be read: {error!r}") from error
    if not isinstance(found, list) or any(type(c) is not int for c in found):
        raise UpdateError("a list of clients has other things in it")
    if found != sorted(set(found)):
        raise UpdateError("a list of clients is not in order")
    return found


def client_list(clients: list[int]) -> bytes:
    """The inverse of `as_clients`."""
    return json.dumps(sorted(clients)).encode()


def plain(message: Task) -> Task:
    """The task without what belongs to this protocol, as a worker runs it."""
    arrays = {k: v for k, v in message.payload.arrays.items() if not k.startswith(PREFIX)}
    numbers = {k: v for k, v in message.payload.numbers.items() if k not in (STAGE, ATTEMPT)}
    return Task(message.round, message.client, Payload(arrays, numbers))


def without_arrays(update: Update, hidden: Collection[str] = ()) -> Payload:
    """Return an update's numbers alone, without those that are hidden."""
    return Payload({}, {k: v for k, v in update.payload.numbers.items() if k not in hidden})


def bits_part(digest: str, packed: Mapping[str, Packed]) -> dict[str, bytes]:
    """The bits of a mask that nobody can derive, under the mask's digest."""
    return {
        f"{BITS}{digest}:{name.removeprefix(MASK_PREFIX)}": bytes(it.data)
        for name, it in packed.items()
    }


def bits_of(message: Task, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Packed]:
    """The inverse of `bits_part`, as `decode_bits` takes it."""
    prefix = f"{PREFIX}{BITS}{digest}:"
    found = {}
    for key, packed in message.payload.arrays.items():
        if key.startswith(prefix) and (name := key.removeprefix(prefix)) in shapes:
            found[MASK_PREFIX + name] = Packed("bits", shapes[name], packed.data)
    return found


def packet_size(plan: Plan) -> int:
    """Bytes of the shares that a client holds of another one: of its key, and of every seed."""
    return SHARE * plan.secrets


def sealed_size(plan: Plan) -> int:
    """Bytes of such a packet as it travels."""
    return SIZE + packet_size(plan) + SEALED
