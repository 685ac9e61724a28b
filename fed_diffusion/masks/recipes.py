"""A mask is described by a few numbers; both ends of the wire derive the same bits from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.config import Config
from fed_diffusion.masks.levels import keep_ratios
from fed_diffusion.rng import Purpose, philox

Masks = dict[str, Tensor]
"""name -> bool tensor shaped like theta[name]; a tensor that is not named is kept whole."""

KINDS = ("full", "random", "topk")
SCOPES = ("weights", "all")
PER = ("tensor", "global")


class RecipeError(ValueError):
    """A recipe that came over the network and describes no legal mask."""


@dataclass(frozen=True)
class Recipe:
    """How one client's mask m_{r,n} of one round comes about.

    Attributes
    ----------
    kind
        full, random (each coordinate kept with probability `keep`) or topk (the largest
        |theta_r|; `per` tensor or global).
    keep
        Keep ratio in (0, 1].
    seed, round, client
        Where the random stream starts.
    scope
        weights: tensors of two or more dimensions, except time and label embeddings; or all.
    """

    kind: str = "full"
    keep: float = 1.0
    seed: int = 0
    round: int = 0
    client: int = 0
    scope: str = "weights"
    per: str = "tensor"

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("kind", self.kind, KINDS),
            ("scope", self.scope, SCOPES),
            ("per", self.per, PER),
        ):
            if value not in legal:
                raise RecipeError(f"recipe: {name} = {value!r}; allowed: {', '.join(legal)}")
        if not 0 < self.keep <= 1:
            raise RecipeError(f"recipe: keep = {self.keep}; it must be above 0 and at most 1")
        if min(self.seed, self.round, self.client) < 0:
            raise RecipeError("recipe: seed, round and client must not be negative")

    @property
    def needs_theta(self) -> bool:
        """Whether the mask depends on theta's values, so that only its bits can travel."""
        return self.kind == "topk"

    def mask(self, theta: Mapping[str, Tensor]) -> Masks:
        """The mask for theta; for random masks only names and shapes matter."""
        if self.kind == "full":
            return {}
        scoped = {name: value for name, value in theta.items() if _in_scope(name, value, self)}
        if self.kind == "random":
            return self._random(scoped)
        if self.per == "global":
            flat = torch.cat([value.detach().abs().flatten() for value in scoped.values()])
            kept = top_k(flat, self.keep).split([value.numel() for value in scoped.values()])
            return {n: m.view(v.shape) for (n, v), m in zip(scoped.items(), kept, strict=True)}
        return {
            name: top_k(value.detach().abs().flatten(), self.keep).view(value.shape)
            for name, value in scoped.items()
        }

    def _random(self, scoped: Mapping[str, Tensor]) -> Masks:
        """Coordinate i is kept if the top 32 bits of the i-th raw word are below floor(p 2^32)."""
        stream = philox(self.seed, Purpose.MASK, self.round, self.client)
        below = np.uint64(math.floor(self.keep * 2**32))
        masks = {}
        for name, value in scoped.items():
            words = np.asarray(stream.random_raw(value.numel()))
            masks[name] = torch.from_numpy((words >> np.uint64(32)) < below).view(value.shape)
        return masks

    def to_metrics(self) -> dict[str, int | float]:
        """The recipe as numbers, the way a reply carries it."""
        return {
            "recipe.kind": KINDS.index(self.kind),
            "recipe.keep": self.keep,
            "recipe.seed": self.seed,
            "recipe.round": self.round,
            "recipe.client": self.client,
            "recipe.scope": SCOPES.index(self.scope),
            "recipe.per": PER.index(self.per),
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_metrics`; refuses what it could not have written."""
        try:
            return cls(
                kind=_member(KINDS, metrics["recipe.kind"]),
                keep=float(metrics["recipe.keep"]),
                seed=int(metrics["recipe.seed"]),
                round=int(metrics["recipe.round"]),
                client=int(metrics["recipe.client"]),
                scope=_member(SCOPES, metrics["recipe.scope"]),
                per=_member(PER, metrics["recipe.per"]),
            )
        except KeyError as error:
            raise RecipeError(f"recipe: {error.args[0]} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"recipe: not readable: {error}") from error

    def differences(self, other: Recipe) -> str:
        """Where two recipes differ, for an error message."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{k} {mine[k]!r} != {theirs[k]!r}" for k in mine if mine[k] != theirs[k])


def _member(names: tuple[str, ...], index: Any) -> str:
    if not isinstance(index, int) or not 0 <= index < len(names):
        raise RecipeError(f"recipe: index {index!r} is none of 0..{len(names) - 1}")
    return names[index]


def recipe_for(config: Config, round: int, client: int) -> Recipe:
    """The recipe that the level of the experiment gives this client in this round."""
    keep = keep_ratios(config)[client]
    if keep == 1:
        return Recipe(round=round, client=client, scope=config.pruning.scope)
    return Recipe(
        kind=config.pruning.kind,
        keep=keep,
        seed=config.seed,
        round=round,
        client=client,
        scope=config.pruning.scope,
        per=config.pruning.per,
    )


def _in_scope(name: str, value: Tensor, recipe: Recipe) -> bool:
    if recipe.scope == "all":
        return True
    return value.dim() >= 2 and not {"time", "label"} & set(name.split("."))


def top_k(magnitude: Tensor, keep: float) -> Tensor:
    """The round-half-up(keep n) largest of n values as a bool mask; ties go to the lower index."""
    n = magnitude.numel()
    k = math.floor(keep * n + 0.5)
    if k in (0, n):
        return torch.full((n,), k == n, dtype=torch.bool)
    threshold = magnitude.kthvalue(n - k + 1).values
    mask = magnitude > threshold
    ties = torch.nonzero(magnitude == threshold).flatten()
    mask[ties[: k - int(mask.sum())]] = True
    return mask


def kept_fraction(masks: Masks, theta: Mapping[str, Tensor]) -> float:
    """The fraction of all coordinates that the mask keeps."""
    total = sum(value.numel() for value in theta.values())
    dropped = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    return 1 - dropped / total


def pruning_error(masks: Masks, theta: Mapping[str, Tensor]) -> float:
    """w^2 = ||theta - theta * m||^2 of Assumption 4.2, summed in float64."""
    return sum(
        float((theta[name] * ~mask).flatten().to(torch.float64).square().sum())
        for name, mask in masks.items()
    )
