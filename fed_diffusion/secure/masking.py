"""The arithmetic of masks that cancel: which coordinates are sent, and what hides them.

The coordinate i of an attempt has k_i members that keep it. Where k_i < least nothing is sent.
Elsewhere a client sends

    y = x + PRG(own seed of level k_i - least) + sum over neighbours v that keep i of +-PRG(s_cv)

modulo 2^64, with + towards neighbours of a higher number. In the sum of all members the pairs
cancel. The seeds of one client's levels are a chain, in which each one gives those above it and
none below. Once d members are lost, the seeds from level d on are opened: those of coordinates
that have at least `least` survivors, whoever it was that is lost. What is below stays hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.coverage import Coverage
from fed_diffusion.masks.mask import Mask, Masks, Scattered, mask_of
from fed_diffusion.secure.keys import KeyPair, Stream, derived
from fed_diffusion.secure.plan import Plan
from fed_diffusion.secure.words import Word, tensor_of, words_of

Theta = Mapping[str, Tensor]
"""Only names and shapes count."""
Vector = dict[Word, np.ndarray]
"""uint64 of one dimension: what a client sends of each word."""


@dataclass(frozen=True)
class Sent:
    """What one client sends of one tensor.

    Attributes
    ----------
    open
        Of the kept values, those that are sent; None: all.
    count
        How many these are.
    levels
        The level of each one, or one for all.
    """

    open: np.ndarray | None
    count: int
    levels: np.ndarray | int


class Openings:
    """How many members keep each coordinate, and what follows for the vectors that are sent.

    Parameters
    ----------
    theta
        Tensors by name.
    plan
        The attempt.
    masks
        Of every member that shares masks.
    shared
        See `words_of`.
    """

    def __init__(self, theta: Theta, plan: Plan, masks: Iterable[Masks], shared: bool = False):
        self.theta, self.plan = theta, plan
        self.words = words_of(theta, shared)
        self._coverage = Coverage(theta, len(plan.members))
        for one in masks:
            self._coverage.add(one)

    def sent(self, name: str, mask: Mask) -> Sent:
        """What a client sends of one tensor, whose mask this is."""
        least = self.plan.least
        everywhere, more = self._coverage.weights(name)
        if least == 1:
            return Sent(None, mask.count(), 0)
        if more is None:
            level = 0 if self.plan.levels == 1 else everywhere - least
            if everywhere < least:
                return Sent(np.zeros(mask.count(), bool), 0, 0)
            return Sent(None, mask.count(), level)
        counts = mask.take(more).reshape(-1).numpy().astype(np.int32) + everywhere
        is_open: np.ndarray | None = counts >= least
        assert is_open is not None
        if is_open.all():
            is_open = None
        else:
            counts = counts[is_open]
        levels = 0 if self.plan.levels == 1 else counts - least
        return Sent(is_open, len(counts), levels)

    def hidden(self, opened: int) -> dict[str, Tensor]:
        """Return what stays hidden where levels from `opened` on are opened, as bools by name.

        Coordinates that nobody keeps count among it; a tensor with nothing hidden is not named.
        """
        if self.plan.least == 1:
            return {}
        few = {
            name: count < self.plan.least + opened
            for name, count in self._coverage.counts().items()
        }
        return {name: hidden for name, hidden in few.items() if bool(hidden.any())}

    def without(self, masks: Masks, hidden: Mapping[str, Tensor]) -> Masks:
        """Return a client's masks without what stays hidden."""
        found = dict(masks)
        for name, cover in hidden.items():
            found[name] = Scattered(mask_of(masks, name, self.theta[name]).dense() & ~cover)
        return found

    def of(self, masks: Masks) -> Part:
        """What a client with these masks sends."""
        named = {name: mask_of(masks, name, whole) for name, whole in self.theta.items()}
        sent = {name: self.sent(name, mask) for name, mask in named.items()}
        return Part(self.plan, named, sent, self.words)


@dataclass(frozen=True)
class Part:
    """What one client sends in an attempt, and the arithmetic with it.

    Attributes
    ----------
    masks, sent
        Of every tensor by name.
    words
        What is sent, in order.
    """

    plan: Plan
    masks: Mapping[str, Mask]
    sent: Mapping[str, Sent]
    words: Sequence[Word]

    def blank(self) -> Vector:
        """Zeros for all that the client sends."""
        return {word: np.zeros(self.sent[tensor_of(word)].count, np.uint64) for word in self.words}

    def chosen(self, values: Mapping[Word, np.ndarray]) -> Vector:
        """What is sent of the client's kept values, int64 as `fixed_point` makes them.

        Where all of a tensor is sent, the vector takes over its memory.
        """
        vector = {}
        for word in self.words:
            sent = self.sent[tensor_of(word)]
            kept = values[word] if sent.open is None else values[word][sent.open]
            vector[word] = kept.view(np.uint64)
        return vector

    def add_own(self, vector: Vector, seed: bytes, opened: int = 0, minus: bool = False) -> None:
        """Add the client's own mask to its vector, as far as it is of levels from `opened` on.

        Parameters
        ----------
        seed
            Of that level.
        minus
            Whether to take it away.
        """
        streams = _Levels(seed, opened, self.plan.digest)
        for name, words in itertools.groupby(self.words, tensor_of):
            levels, parts = self.sent[name].levels, [vector[word] for word in words]
            if isinstance(levels, int):
                if levels >= opened:
                    streams[levels].add_to_each(parts, None, minus)
                continue
            for level in np.flatnonzero(np.bincount(levels)):
                if level >= opened:
                    streams[int(level)].add_to_each(parts, levels == level, minus)

    def add_pair(self, vector: Vector, others: Masks, key: bytes, minus: bool = False) -> None:
        """Add what the client shares with a neighbour to the client's vector.

        Parameters
        ----------
        others
            The neighbour's masks.
        key
            Theirs alone; see `pair_key`.
        minus
            Whether to take it away.
        """
        stream = Stream(key)
        for name, words in itertools.groupby(self.words, tensor_of):
            mask, other, where = self.masks[name], others.get(name), None
            if other is not None and not other.whole and mask != other:
                where = mask.take(other.dense()).reshape(-1).numpy()
                is_open = self.sent[name].open
                where = where if is_open is None else where[is_open]
            stream.add_to_each([vector[word] for word in words], where, minus)

    def scatter(self, vector: Vector, sums: Mapping[Word, Tensor]) -> None:
        """Add the client's vector to the sums: int64 of theta's shapes, modulo 2^64."""
        for word in self.words:
            mask, sent = self.masks[tensor_of(word)], self.sent[tensor_of(word)]
            kept = vector[word].view(np.int64)
            if sent.open is not None:
                kept = np.zeros(len(sent.open), np.int64)
                kept[sent.open] = vector[word].view(np.int64)
            mask.add(torch.from_numpy(kept).view(mask.kept), sums[word])


class _Levels:
    """The streams of a client's own mask, by level."""

    def __init__(self, seed: bytes, level: int, digest: bytes):
        self._seeds = {level: seed}
        self._last, self._digest = level, digest
        self._streams: dict[int, Stream] = {}

    def __getitem__(self, level: int) -> Stream:
        while self._last < level:
            self._seeds[self._last + 1] = next_seed(self._seeds[self._last])
            self._last += 1
        if level not in self._streams:
            self._streams[level] = Stream(derived(self._seeds[level], b"own mask" + self._digest))
        return self._streams[level]


def next_seed(seed: bytes) -> bytes:
    """The seed of the level above: there is no way back."""
    return derived(seed, b"next level")


def chain(seed: bytes, levels: int) -> Iterator[bytes]:
    """The seeds of so many levels, from the lowest."""
    for _ in range(levels):
        yield seed
        seed = next_seed(seed)


def pair_key(pair: KeyPair, public: bytes, plan: Plan, one: int, other: int) -> bytes:
    """The key of what two neighbours share in this attempt, the same from either side."""
    low, high = sorted((one, other))
    return pair.agree(public, b"pair mask" + plan.digest + f"{low} {high}".encode())


def flat(vector: Vector) -> bytes:
    """A vector as it travels: little-endian, tensor after tensor."""
    return b"".join(part.astype("<u8", copy=False).data for part in vector.values())


def parted(data: bytes | memoryview, like: Vector) -> Vector:
    """The inverse of `flat`, shaped like another vector; `ValueError` at a wrong length."""
    total = sum(len(part) for part in like.values())
    if len(data) != 8 * total:
        raise ValueError(f"its vector has {len(data)} bytes, and its mask implies {8 * total}")
    # a bytearray's words can be written to, as torch wants it
    words, start, found = np.frombuffer(bytearray(data), "<u8"), 0, {}
    for name, part in like.items():
        found[name] = words[start : start + len(part)]
        start += len(part)
    return found
