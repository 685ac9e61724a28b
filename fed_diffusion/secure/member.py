"""A client's half of secure aggregation: what it answers in each of the four exchanges.

What it has to remember from one to the next is a string of bytes, which its engine keeps on the
client's own machine and hands back; none of it ever travels. Of an attempt that is over nothing is
left in it but its number, so that it cannot begin again.
"""

from __future__ import annotations

import json
from typing import Any

from fed_diffusion.build import Setup
from fed_diffusion.config.secure import SecureConfig
from fed_diffusion.protocol.errors import DivergedError, ForgottenError, UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import Wire
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.graph import degree_of
from fed_diffusion.secure.keys import SIZE, KeyPair, SealBroken, digest, fresh, seal, unseal
from fed_diffusion.secure.masking import chain
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.noise import Share
from fed_diffusion.secure.plan import Plan, PlanError
from fed_diffusion.secure.shamir import SHARE, split
from fed_diffusion.secure.vectors import Vectors
from fed_diffusion.secure.words import MEASURED

Known = dict[str, Any]
"""What a client remembers, as JSON holds it; bytes are in hexadecimal."""


class Members:
    """Answers for any client of a run; all that is one client's is in the bytes it remembers.

    Parameters
    ----------
    settings
        The section `secure` of the configuration.
    """

    def __init__(self, settings: SecureConfig, vectors: Vectors):
        self._settings, self._vectors = settings, vectors

    @classmethod
    def of(cls, setup: Setup) -> Members:
        """Return the members of a run."""
        config = setup.config
        wire = Wire(config.wire, config.pruning, config.local, setup.family, config.seed)
        summed = config.secure.losses == "summed"
        noise = Share.of(config.privacy, config.secure.least)
        parts = wire, setup.shapes, setup.layout, noise
        vectors = Vectors(config.round.weighting, summed, *parts)
        return cls(config.secure, vectors)

    def answer(self, task: Task, memory: bytes | None) -> tuple[Update, bytes]:
        """Return the answer to a task of any exchange but the third, and what to remember then.

        Raises
        ------
        UpdateError, PlanError
            The task does not go with what was agreed on: the client takes no part.
        """
        stage = m.stage_of(task)
        if stage == Stage.KEYS:
            return self._keys(task, memory)
        known = _known(task, memory)
        if stage == Stage.SHARES:
            return self._shares(task, known)
        if stage == Stage.OPEN:
            return _open(task, known), _over(task)
        raise UpdateError("a task of this exchange is trained first; see `mask`")

    def _keys(self, task: Task, memory: bytes | None) -> tuple[Update, bytes]:
        attempt, before = m.attempt_of(task), _read(memory).get("attempt", 0)
        if attempt <= before:  # no attempt begins twice, or after a later one
            raise ForgottenError(
                f"keys for attempt {attempt} are asked for, after those of {before}"
            )
        sealing, pairs = KeyPair.new(), KeyPair.new()
        known: Known = {"round": task.round, "attempt": attempt}
        known |= {"seal": sealing.private.hex(), "pair": pairs.private.hex()}
        return m.reply(Stage.KEYS, task, {m.KEYS: sealing.public + pairs.public}), _to_bytes(known)

    def _shares(self, task: Task, known: Known) -> tuple[Update, bytes]:
        if "plan" in known:
            raise PlanError("a second plan for the same keys")
        text = m.part_of(task, m.PLAN)
        plan = Plan.from_json(text)
        self._check_plan(plan, task, known)
        sealing, seed, client = _pair(known, "seal"), fresh(), task.client
        holders = plan.holders(client)
        seeds = list(chain(seed, plan.levels))
        secrets = [bytes.fromhex(known["pair"]), *seeds]
        columns = [split(secret, len(holders), plan.needed(client)) for secret in secrets]
        packets = {holder: b"".join(c[i] for c in columns) for i, holder in enumerate(holders)}
        hashes = b"".join(_hashes(packet) for packet in packets.values())
        known |= {"plan": text.decode(), "seed": seed.hex(), "held": packets.pop(client).hex()}
        sealed = b""
        for holder, packet in packets.items():
            key = _seal_key(sealing, plan, client, holder)
            sealed += seal(key, plan.digest + packet, _about(client, holder))
        parts = {m.SEALED_SHARES: sealed, m.SEEDS: b"".join(map(digest, seeds)), m.HASHES: hashes}
        return m.reply(Stage.SHARES, task, parts), _to_bytes(known)

    def _check_plan(self, plan: Plan, task: Task, known: Known) -> None:
        mine, settings = plan.by_client.get(task.client), self._settings
        if mine is None or plan.round != task.round:
            raise PlanError("the plan is of another round, or this client is not in it")
        keys = _pair(known, "seal").public, _pair(known, "pair").public
        if (mine.seal, mine.pair) != keys:
            raise PlanError("the plan has other keys for this client than its own")
        if (plan.least, plan.threshold) != (settings.least, settings.threshold):
            raise PlanError("the plan has another secure.least or secure.threshold than the run")
        asked = settings.neighbours, plan.threshold, len(plan.members), plan.equal
        if plan.degree != (degree := degree_of(*asked)):
            raise PlanError(f"the plan has {plan.degree} neighbours for each, and {degree} are due")

    def mask(self, task: Task, update: Update, memory: bytes | None) -> tuple[Update, bytes]:
        """Return what the client sends in the place of the update that its worker has made.

        An update that must not count has no vector, and says why: nobody else could see it. Nor
        has one where a neighbour was told another plan; that attempt is over then.
        """
        known = _known(task, memory)
        plan = _plan_of(known)
        if "here" in known:
            raise PlanError("a second vector for the same keys")
        here = m.clients_of(task, m.HERE)
        if task.client not in here or not set(here) <= plan.by_client.keys():
            raise PlanError("those who share masks are not those of the plan")
        if len(here) < plan.least:
            raise PlanError(
                f"{len(here)} clients share masks, and a sum of fewer than secure.least = "
                f"{plan.least} is not opened"
            )
        complaints, odd = _take_shares(task, known, plan, here)
        known["here"] = here
        vectors = self._vectors
        numbers = m.without_arrays(update, MEASURED if vectors.summed else ())
        if odd:
            numbers.numbers[m.FAULT] = m.OTHER_PLAN
            parts = {m.COMPLAINTS: m.client_list(odd)}
            return m.reply(Stage.VECTORS, task, parts, numbers), _over(task)
        masks, theta = vectors.begin(task, plan)
        try:
            values = vectors.fixed(update, theta, masks, plan)
        except UpdateError as error:
            diverged = isinstance(error, DivergedError)
            numbers.numbers[m.FAULT] = m.DIVERGED if diverged else m.OUT_OF_RANGE
            return m.reply(Stage.VECTORS, task, {}, numbers), _to_bytes(known)
        secrets = bytes.fromhex(known["seed"]), _pair(known, "pair")
        vector = vectors.hidden(task, plan, here, masks, values, *secrets)
        parts = {m.VECTOR: vector, m.COMPLAINTS: m.client_list(complaints)}
        return m.reply(Stage.VECTORS, task, parts, numbers), _to_bytes(known)


def _take_shares(
    task: Task, known: Known, plan: Plan, here: list[int]
) -> tuple[list[int], list[int]]:
    """Open what neighbours have sealed; return whose shares are of no use, and of another plan."""
    client, sealing, size = task.client, _pair(known, "seal"), m.sealed_size(plan)
    others, each = [o for o in plan.neighbours[client] if o in here], SIZE * plan.secrets
    sealed = m.part_of(task, m.SEALED_SHARES, size * len(others))
    hashes = m.part_of(task, m.HASHES, each * len(others))
    held: dict[int, str] = {client: known["held"]}
    complaints: list[int] = []
    odd: list[int] = []
    for place, other in enumerate(others):
        key = _seal_key(sealing, plan, client, other)
        try:
            packet = unseal(key, sealed[size * place :][:size], _about(other, client))
        except SealBroken:
            complaints.append(other)
            continue
        if packet[:SIZE] != plan.digest:
            odd.append(other)
        held[other] = packet[SIZE:].hex()
        if _hashes(packet[SIZE:]) != hashes[each * place :][:each]:
            complaints.append(other)
    known["held"] = {str(holder): packet for holder, packet in held.items()}
    return complaints, odd


def _open(task: Task, known: Known) -> Update:
    """Give a share of every member: of its own mask if it is left, else of its key; never both."""
    plan = _plan_of(known)
    if "here" not in known:
        raise PlanError("a sum is to be opened, and no vector was sent")
    here, left = known["here"], m.clients_of(task, m.LEFT)
    if not set(left) <= set(here):
        raise PlanError("those who are left are not among those who shared masks")
    level = plan.opened_level(len(here), len(left))
    opened = b""
    for client in plan.holders(task.client):
        if client in here:
            packet = bytes.fromhex(known["held"].get(str(client), "00" * m.packet_size(plan)))
            place = 1 + level if client in left else 0
            opened += packet[SHARE * place :][:SHARE]
    return m.reply(Stage.OPEN, task, {m.OPENED: opened})


def _known(task: Task, memory: bytes | None) -> Known:
    """Return what the client remembers of a task's attempt; that of another one stays as it is."""
    known, attempt = _read(memory), m.attempt_of(task)
    if (known.get("round"), known.get("attempt")) != (task.round, attempt):
        there = f"it knows attempt {known['attempt']}" if known else "was its node started again?"
        raise ForgottenError(
            f"this client knows nothing of the secure aggregation of round {task.round}, attempt "
            f"{attempt}: {there}"
        )
    if "seal" not in known:
        raise ForgottenError(f"this client knows nothing of attempt {attempt} any more: it is over")
    return known


def _over(task: Task) -> bytes:
    """Return what is remembered of a task's attempt when it is over: keys come for later ones."""
    return _to_bytes({"round": task.round, "attempt": m.attempt_of(task)})


def _read(memory: bytes | None) -> Known:
    known: Known = json.loads(memory) if memory else {}
    return known


def _plan_of(known: Known) -> Plan:
    if "plan" not in known:
        raise PlanError("no plan of the round has come")
    return Plan.from_json(known["plan"].encode())


def _pair(known: Known, name: str) -> KeyPair:
    return KeyPair.of(bytes.fromhex(known[name]))


def _hashes(packet: bytes) -> bytes:
    """Return the hash of each share of a packet."""
    return b"".join(digest(packet[at:][:SHARE]) for at in range(0, len(packet), SHARE))


def _seal_key(pair: KeyPair, plan: Plan, client: int, other: int) -> bytes:
    low, high = sorted((client, other))
    # not of the plan's digest: that is inside, so that another plan is told from a broken seal
    about = f"seal {plan.round} {low} {high}".encode()
    return pair.agree(plan.by_client[other].seal, about)


def _about(sender: int, receiver: int) -> bytes:
    return f"shares {sender} to {receiver}".encode()


def _to_bytes(known: Known) -> bytes:
    return json.dumps(known).encode()
