"""A mask is described by a few numbers; both ends of the wire derive the same bits from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fed_diffusion.common.rng import Purpose, philox
from fed_diffusion.masks import channels, scattered
from fed_diffusion.masks.channels import CHOICES
from fed_diffusion.masks.mask import Block, Masks, Scattered
from fed_diffusion.masks.spaces import Layout

Numbers = dict[str, int | float | list[int]]
"""What a message carries beside tensors."""

KINDS = ("full", "random", "topk", "channels", "balanced")
SCOPES = ("weights", "all")
PER = ("tensor", "global")
UNITS = ("weights", "channels")
GROUPS_LIMIT = 1 << 20
"""Above any number of groups that a network has."""


class RecipeError(ValueError):
    """A recipe that came over the network and describes no legal mask."""


@dataclass(frozen=True)
class Recipe:
    """How one client's mask m_{r,n} of one round comes about.

    Attributes
    ----------
    kind
        full; random (each coordinate kept with probability `keep`); topk (the largest |theta_r|,
        `per` tensor or global); channels (whole channel groups, by `choice`); balanced (drops that
        spread evenly over the clients of a round, of single weights or of channels: `unit`).
    keep
        Keep ratio in (0, 1].
    seed, round, client
        Where the random stream starts.
    scope
        weights: tensors of two or more dimensions, except time and label embeddings; or all.
        Channels take everything that belongs to them, whatever the scope.
    start, end
        For balanced weights: where this client's interval starts and where all of them end.
    groups
        For channels that only theta_r tells (magnitude, balanced): the kept groups, all spaces
        one after another.
    """

    kind: str = "full"
    keep: float = 1.0
    seed: int = 0
    round: int = 0
    client: int = 0
    scope: str = "weights"
    per: str = "tensor"
    choice: str = "ordered"
    unit: str = "weights"
    start: int = 0
    end: int = 0
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, legal in _NAMED.items():
            if getattr(self, name) not in legal:
                raise RecipeError(
                    f"recipe: {name} = {getattr(self, name)!r}; allowed: {', '.join(legal)}"
                )
        if not 0 < self.keep <= 1:
            raise RecipeError(f"recipe: keep = {self.keep}; it must be above 0 and at most 1")
        if min(self.seed, self.round, self.client) < 0:
            raise RecipeError("recipe: seed, round and client must not be negative")
        if not (0 <= self.start < scattered.WORD and 0 <= self.end < scattered.WORD):
            raise RecipeError("recipe: start and end must be from 0 to 2^32 - 1")

    @property
    def by_channels(self) -> bool:
        """Whether whole channels are dropped, so that the client's network is smaller."""
        return self.kind == "channels" or (self.kind == "balanced" and self.unit == "channels")

    @property
    def needs_bits(self) -> bool:
        """Whether the mask depends on theta's values, so that only its bits can travel."""
        return self.kind == "topk" or (self.kind == "balanced" and self.unit == "weights")

    def mask(self, theta: Mapping[str, Tensor], layout: Layout | None = None) -> Masks:
        """The mask for theta; only where `needs_bits` do theta's values matter.

        Parameters
        ----------
        theta
            Tensors by name.
        layout
            The network's channel spaces, where whole channels are dropped.

        Raises
        ------
        RecipeError
            It does not fit this network.
        """
        if self.kind == "full":
            return {}
        if self.by_channels:
            return dict(self._blocks(layout))
        scoped = {name: value for name, value in theta.items() if _in_scope(name, value, self)}
        if self.kind == "topk":
            return _scattered(scattered.top_k_mask(scoped, self.keep, self.per))
        if self.kind == "random":
            stream = philox(self.seed, Purpose.MASK, self.round, self.client)
            return _scattered(scattered.random_mask(scoped, self.keep, stream))
        stream = philox(self.seed, Purpose.MASK, self.round)  # the same for all clients
        return _scattered(
            scattered.balanced_mask(scoped, self.keep, self.per, self.start, self.end, stream)
        )

    def check_bits(self, masks: Masks, theta: Mapping[str, Tensor]) -> None:
        """Whether bits that came over the network can be this recipe's; only theta's shapes count.

        Raises
        ------
        RecipeError
            They mask other tensors, or keep another number of weights than the ratio says.
        """
        sizes = {n: v.numel() for n, v in theta.items() if _in_scope(n, v, self)}
        if masks.keys() != sizes.keys():
            odd = sorted(masks.keys() ^ sizes.keys())[:3]
            raise RecipeError(f"recipe: bits for other tensors than it masks, first of them: {odd}")
        if self.kind != "topk":
            return
        if self.per == "global":
            sizes = {"all tensors": sum(sizes.values())}
        kept = {name: mask.count() for name, mask in masks.items()}
        if self.per == "global":
            kept = {"all tensors": sum(kept.values())}
        for name, size in sizes.items():
            if kept[name] != scattered.rounded(self.keep, size):
                raise RecipeError(
                    f"recipe: the bits keep {kept[name]} of {size} in {name}; "
                    f"keep = {self.keep:g} means {scattered.rounded(self.keep, size)}"
                )

    def _blocks(self, layout: Layout | None) -> dict[str, Block]:
        if layout is None:
            raise RecipeError("recipe: channels of a network whose channel spaces are not known")
        try:
            counts = layout.counts(self.keep)
            if self.groups or self.kind == "balanced" or self.choice == "magnitude":
                kept = channels.unflatten(layout, counts, self.groups)
            elif self.choice == "rolling":
                kept = channels.rolling(layout, counts, self.round)
            elif self.choice == "random":
                kept = channels.random(layout, counts, self.seed, self.round, self.client)
            else:
                kept = channels.ordered(layout, counts)
        except ValueError as error:
            raise RecipeError(f"recipe: {error}") from error
        return layout.blocks(kept)

    def to_metrics(self) -> Numbers:
        """The recipe as numbers, the way a task and a reply carry it."""
        numbers: Numbers = {}
        for name, value in asdict(self).items():
            if name in _NAMED:
                numbers[f"recipe.{name}"] = _NAMED[name].index(value)
            elif name == "groups":
                numbers |= {"recipe.groups": list(value)} if value else {}
            else:
                numbers[f"recipe.{name}"] = value
        return numbers

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_metrics`; refuses what it could not have written."""
        try:
            fields: dict[str, Any] = {n: _member(n, metrics[f"recipe.{n}"]) for n in _NAMED}
            fields |= {name: int(metrics[f"recipe.{name}"]) for name in _WHOLE}
            return cls(
                **fields,
                keep=float(metrics["recipe.keep"]),
                groups=_groups(metrics.get("recipe.groups", ())),
            )
        except KeyError as error:
            raise RecipeError(f"recipe: {error.args[0]} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"recipe: not readable: {error}") from error

    def differences(self, other: Recipe) -> str:
        """Where two recipes differ, for an error message."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{k} {mine[k]!r} != {theirs[k]!r}" for k in mine if mine[k] != theirs[k])


_NAMED = {"kind": KINDS, "scope": SCOPES, "per": PER, "choice": CHOICES, "unit": UNITS}
_WHOLE = ("seed", "round", "client", "start", "end")


def _member(field: str, index: Any) -> str:
    names = _NAMED[field]
    if not isinstance(index, int) or not 0 <= index < len(names):
        raise RecipeError(f"recipe: {field} = {index!r} is none of 0..{len(names) - 1}")
    return names[index]


def _groups(numbers: Any) -> tuple[int, ...]:
    if len(numbers) > GROUPS_LIMIT or any(type(number) is not int for number in numbers):
        raise RecipeError("recipe: groups is not a list of whole numbers, or far too long")
    return tuple(numbers)


def _in_scope(name: str, value: Tensor, recipe: Recipe) -> bool:
    if recipe.scope == "all":
        return True
    return value.dim() >= 2 and not {"time", "label"} & set(name.split("."))


def _scattered(bools: Mapping[str, Tensor]) -> Masks:
    return {name: Scattered(kept) for name, kept in bools.items()}
