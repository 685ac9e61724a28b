"""A federation of a few numbers, for the protocol alone: no network is trained."""

import torch

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.aggregation.private import PrivateMean
from fed_diffusion.config import load_config
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.mask import mask_of
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.codecs import cast
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.wire import Payload, Wire, decode_update, encode_task, encode_update
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.gathering import Gathering
from fed_diffusion.secure.member import Members
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.noise import Share
from fed_diffusion.secure.vectors import Vectors
from tests.tiny import TINY


class Federation:
    """Clients with masks and made-up updates, and one attempt at a round after another.

    `lost` says whom an attempt loses, and before which answer.
    """

    def __init__(self, clients=5, sizes=((6, 5), (7,)), keeps=None, seed=0, **settings):
        keeps = keeps or [1.0] * clients
        kind = settings.pop("pruning.kind", "full" if set(keeps) == {1.0} else "random")
        given = {"clients": clients, "secure.aggregation": True, "pruning.kind": kind}
        given |= {} if kind == "full" else {"pruning.keep": keeps}
        self.config = load_config("digits", TINY | given | settings)
        noise = torch.Generator().manual_seed(seed)
        self.theta = {f"t{i}": torch.randn(size, generator=noise) for i, size in enumerate(sizes)}
        config = self.config
        family = family_of(config.pruning, config.seed)
        self.wire = Wire(config.wire, config.pruning, config.local, family, config.seed)
        planned = family.plan(1, {c: k for c, k in enumerate(keeps) if k < 1}, self.theta, None)
        self.recipes = {c: planned.get(c, Recipe(round=1, client=c)) for c in range(clients)}
        for recipe in planned.values():
            object.__setattr__(recipe, "needs_bits", family.sends_bits)
        self.masks = {c: derive(family, r, self.theta) for c, r in self.recipes.items()}
        self.updates = {c: self._update(c, noise) for c in range(clients)}
        noise = Share.of(config.privacy, config.secure.least)
        parts = self.wire, self.theta, None, noise
        vectors = Vectors(config.round.weighting, config.secure.losses == "summed", *parts)
        self.members = Members(config.secure, vectors)

    def _update(self, client, noise):
        masks, end = self.masks[client], {}
        for name, whole in self.theta.items():
            end[name] = whole + torch.randn(whole.shape, generator=noise)
        arrays = encode_update(end, self.theta, masks, self.wire, 1, client)
        return Update(1, client, Payload(arrays, {"examples": 10 + client}))

    def task_payload(self, client):
        casts = {n: cast(v, "fp32", False, None) for n, v in self.theta.items()}
        return encode_task(casts, self.recipes[client], self.masks[client])

    def gathering(self):
        return Gathering(
            1,
            self.config.secure,
            self.theta,
            self.recipes,
            self.masks.__getitem__,
            len(self.recipes),
            1,
        )

    def attempt(self, lost=None, change=lambda update: update):
        """An attempt up to its opening; returns the gathering, after all answers have come."""
        lost, memory, gathering = lost or {}, {}, self.gathering()
        self.seen = []
        for stage, prepare, parts, take in (
            (Stage.KEYS, None, lambda c: {}, gathering.take_keys),
            (Stage.SHARES, gathering.agree, gathering.share_parts, gathering.take_shares),
            (Stage.VECTORS, gathering.meet, gathering.vector_parts, None),
            (Stage.OPEN, gathering.level, gathering.open_parts, gathering.take_opened),
        ):
            if prepare:
                prepare()
            for client in gathering.clients(stage):
                if lost.get(client) == stage:
                    continue
                payload = self.task_payload(client) if stage == Stage.VECTORS else None
                task = m.task(stage, 1, client, parts(client), payload)
                if stage == Stage.VECTORS:
                    update = self.updates[client]
                    answer, memory[client] = self.members.mask(task, update, memory[client])
                else:
                    answer, memory[client] = self.members.answer(task, memory.get(client))
                answer = change(answer)
                self.seen.append(answer)
                if stage == Stage.VECTORS:
                    gathering.take_vector(answer, 1, self.masks[client])
                else:
                    take(answer)
        return gathering

    def opened(self, gathering):
        """The mean that comes out, and how many coordinates stay hidden."""
        mean = MaskedMean(self.theta, len(self.recipes))
        if self.config.privacy.clip is not None:
            everyone = self.masks.values()
            mean = PrivateMean(self.theta, everyone, 1.0, self.config.privacy)
        withheld = gathering.opening().into(mean)
        return mean, withheld

    def plain(self, clients):
        """Equation (8) of these clients, without any of this."""
        mean = MaskedMean(self.theta, len(self.recipes))
        for client in clients:
            arrays = self.updates[client].payload.arrays
            values = decode_update(arrays, self.theta, self.masks[client], self.wire)
            mean.add(values, self.masks[client])
        return mean

    def kept(self, clients):
        """How many of these clients keep each coordinate."""
        return {
            name: sum(mask_of(self.masks[c], name, whole).dense().int() for c in clients)
            for name, whole in self.theta.items()
        }
