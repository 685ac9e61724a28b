"""What a mask keeps of one tensor: all of it, single weights, or whole channels.

The masks of a network are a mapping by tensor name. A name that is missing means that all of that
tensor is kept, and `mask_of` gives a `Whole` for it, so nobody has to ask which kind a mask is.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""Indices along one dimension as [start, stop) runs, ascending."""


class Mask(ABC):
    """What is kept of one tensor of a network: `Whole`, `Scattered` or `Block`.

    The kept values have a shape of their own, `kept`, in which they travel and are averaged. A
    worker holds a tensor that it can compute with: `hold` makes it of the kept values, and
    `release` takes them out of it again.

    Attributes
    ----------
    whole
        Whether everything is kept.
    shrinks
        Whether a worker holds a smaller tensor, so that it has nothing to mask while it trains.
    shape
        The shape of the whole tensor.
    bools
        Where single values are dropped inside a tensor of the whole shape: true where the mask
        keeps. None where the kept values lie densely.
    """

    whole: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    shape: tuple[int, ...]
    bools: Tensor | None = None

    @property
    @abstractmethod
    def kept(self) -> tuple[int, ...]:
        """The shape of the kept values."""

    def count(self) -> int:
        """Return how many values are kept."""
        return math.prod(self.kept)

    @abstractmethod
    def take(self, whole: Tensor) -> Tensor:
        """Return the kept values of a whole tensor, shaped like `kept`."""

    @abstractmethod
    def put(self, kept: Tensor, whole: Tensor) -> Tensor:
        """Write kept values to their place in a whole tensor, and return that tensor."""

    @abstractmethod
    def add(self, kept: Tensor, whole: Tensor) -> None:
        """Add kept values at their place in a whole tensor."""

    @abstractmethod
    def add_to(self, counts: Tensor, weight: int) -> None:
        """Add a weight wherever the mask keeps; `counts` is shaped like the whole tensor."""

    @abstractmethod
    def drop(self, whole: Tensor) -> Tensor:
        """Return what the mask drops of a whole tensor: a copy with zeros where the mask keeps."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the mask as bools, shaped like the whole tensor."""

    def rows(self, values: Tensor) -> Tensor:
        """Return the entries of kept rows, of one entry for each row of the whole tensor.

        Raises
        ------
        ValueError
            Single values are kept, which leaves no rows.
        """
        return values

    def hold(self, kept: Tensor) -> Tensor:
        """Return the tensor that a worker computes with, made of the kept values."""
        return kept

    def release(self, held: Tensor) -> Tensor:
        """Return the kept values of the tensor that a worker has computed with."""
        return held


Masks = Mapping[str, Mask]
"""Tensor name -> what is kept of it; a tensor that is not named is kept whole."""


@dataclass(frozen=True)
class Whole(Mask):
    """All of a tensor is kept."""

    whole: ClassVar[bool] = True
    shape: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.shape

    def take(self, whole: Tensor) -> Tensor:
        return whole

    def put(self, kept: Tensor, whole: Tensor) -> Tensor:
        return whole.copy_(kept)

    def add(self, kept: Tensor, whole: Tensor) -> None:
        whole += kept

    def add_to(self, counts: Tensor, weight: int) -> None:
        counts += weight

    def drop(self, whole: Tensor) -> Tensor:
        return torch.zeros_like(whole)

    def dense(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Scattered(Mask):
    """Single values are kept, and the others are zeros inside a tensor of the whole shape.

    Parameters
    ----------
    bools
        True where a value is kept; a bool tensor shaped like the whole one. The kept values are
        one-dimensional, in the order of the whole tensor.
    """

    bools: Tensor = field()

    def __post_init__(self) -> None:
        if self.bools.dtype != torch.bool:
            raise TypeError(f"a mask of single weights is a bool tensor, not {self.bools.dtype}")
        object.__setattr__(self, "bools", self.bools.cpu())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scattered) and torch.equal(self.bools, other.bools)

    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of the whole tensor."""
        return tuple(self.bools.shape)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The shape of the kept values, which has one dimension."""
        # NumPy counts 40 times as fast as torch sums
        return (int(np.count_nonzero(self.bools.numpy())),)

    def take(self, whole: Tensor) -> Tensor:
        """Return the kept values on the CPU, five times as fast as torch's whole[bools]."""
        raw = whole.contiguous().view(torch.int16) if whole.dtype == torch.bfloat16 else whole
        kept = torch.from_numpy(np.compress(self.bools.numpy().ravel(), raw.numpy().ravel()))
        return kept.view(whole.dtype)

    def put(self, kept: Tensor, whole: Tensor) -> Tensor:
        return whole.masked_scatter_(self.bools, kept)

    def add(self, kept: Tensor, whole: Tensor) -> None:
        whole[self.bools] += kept

    def add_to(self, counts: Tensor, weight: int) -> None:
        if counts.dtype == torch.uint8 and weight == 1:
            counts += self.bools.view(torch.uint8)
        else:
            counts.add_(self.bools, alpha=weight)

    def drop(self, whole: Tensor) -> Tensor:
        return whole.masked_fill(self.bools, 0)

    def dense(self) -> Tensor:
        return self.bools

    def rows(self, values: Tensor) -> Tensor:
        raise ValueError("single values of scaled rows cannot be taken: use one scale")

    def hold(self, kept: Tensor) -> Tensor:
        """Return a tensor of the whole shape, with zeros where the mask drops."""
        whole = np.zeros(self.bools.numel(), np.float32)
        whole[np.flatnonzero(self.bools.numpy())] = kept.numpy()
        return torch.from_numpy(whole).view(self.shape)

    def release(self, held: Tensor) -> Tensor:
        return self.take(held)


@dataclass(frozen=True)
class Block(Mask):
    """The part of a tensor that is left when whole channels are dropped.

    Attributes
    ----------
    shape
        The shape of the whole tensor.
    runs
        The kept indices of each dimension; the block is their product.
    """

    shrinks: ClassVar[bool] = True
    shape: tuple[int, ...]
    runs: tuple[Runs, ...]

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The shape of the block."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Return matching slices of the whole tensor and of the block."""
        per_dimension = []
        for runs in self.runs:
            here, pairs = 0, []
            for start, stop in runs:
                pairs.append((slice(start, stop), slice(here, here + stop - start)))
                here += stop - start
            per_dimension.append(pairs)
        for choice in itertools.product(*per_dimension):
            yield tuple(there for there, _ in choice), tuple(here for _, here in choice)

    def take(self, whole: Tensor) -> Tensor:
        block = whole.new_empty(self.kept)
        for there, here in self.pieces():
            block[here] = whole[there]
        return block

    def put(self, kept: Tensor, whole: Tensor) -> Tensor:
        for there, here in self.pieces():
            whole[there] = kept[here]
        return whole

    def add(self, kept: Tensor, whole: Tensor) -> None:
        for there, here in self.pieces():
            whole[there] += kept[here]

    def add_to(self, counts: Tensor, weight: int) -> None:
        for there, _ in self.pieces():
            counts[there] += weight

    def drop(self, whole: Tensor) -> Tensor:
        return self.put(whole.new_zeros(self.kept), whole.clone())

    def dense(self) -> Tensor:
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for there, _ in self.pieces():
            mask[there] = True
        return mask

    def rows(self, values: Tensor) -> Tensor:
        return torch.cat([values[start:stop] for start, stop in self.runs[0]])


def mask_of(masks: Masks, name: str, whole: Tensor) -> Mask:
    """Return the mask of one tensor: `Whole` where the masks do not name it.

    Parameters
    ----------
    whole
        The tensor itself; only its shape counts.
    """
    found = masks.get(name)
    return Whole(tuple(whole.shape)) if found is None else found


def kept_values(theta: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Return what the masks keep of every tensor, by name."""
    return {name: mask_of(masks, name, whole).take(whole) for name, whole in theta.items()}


def kept_fraction(masks: Masks, theta: Mapping[str, Tensor]) -> float:
    """Return the fraction of all coordinates that the masks keep."""
    total = sum(value.numel() for value in theta.values())
    dropped = sum(theta[name].numel() - mask.count() for name, mask in masks.items())
    return 1 - dropped / total


def pruning_error(masks: Masks, theta: Mapping[str, Tensor]) -> float:
    """Return w^2 = ||theta - theta * m||^2 of Assumption 4.2, summed in float64."""
    norms = (
        float(torch.linalg.vector_norm(mask.drop(theta[name]), dtype=torch.float64))
        for name, mask in masks.items()
    )
    return sum((norm**2 for norm in norms), 0.0)
