"""Balanced masks that mind magnitude: pruning.kind = balanced with pruning.by = magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from torch import Tensor

from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks import turns
from fed_diffusion.masks.families.contract import Family
from fed_diffusion.masks.families.weights import PER, SCOPES, in_scope, sizes_of
from fed_diffusion.masks.mask import Masks, Scattered
from fed_diffusion.masks.recipe import Recipe, RecipeError
from fed_diffusion.masks.spaces import Layout

Theta = Mapping[str, Tensor]
MOST_WORKERS = 1 << 20


class BalancedByMagnitude(Family):
    """Weak workers take turns among the smallest weights; see `masks.turns`.

    A recipe names the ratios of all weak workers of the round, smallest first, as (numerator,
    denominator, how many have this ratio), and the worker's place among them. Within a ratio the
    places move by one each round.
    """

    sends_bits = True

    def __init__(self, pruning: PruningConfig, seed: int):
        self._options = {
            "unit": "weights",
            "by": "magnitude",
            "scope": pruning.scope,
            "per": pruning.per,
        }
        self._seed = seed
        self._dealt: tuple[list[object], list[Tensor], dict[str, turns.Deal]] | None = None
        """The last deal, and what it was made of: all clients of a round need the same deal."""

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Theta, spaces: Layout | None
    ) -> dict[int, Recipe]:
        groups: dict[Fraction, list[int]] = {}
        for client, keep in keeps.items():
            groups.setdefault(turns.as_fraction(keep), []).append(client)
        ratios: list[int] = []
        places: dict[int, int] = {}
        for ratio, clients in sorted(groups.items()):
            ratios += [ratio.numerator, ratio.denominator, len(clients)]
            turn = round % len(clients)
            for client in clients[turn:] + clients[:turn]:
                places[client] = len(places)
        return {
            client: Recipe(
                "balanced",
                keep,
                self._seed,
                round,
                client,
                self._options | {"ratios": tuple(ratios), "place": places[client]},
            )
            for client, keep in keeps.items()
        }

    def derive(self, recipe: Recipe, theta: Theta, spaces: Layout | None) -> Masks:
        scope, per, ratios, place = self._read(recipe)
        scoped = in_scope(theta, scope)
        deals = self._deals(scoped, ratios, per)
        kept = turns.masks_of(deals, scoped, place)
        return {name: Scattered(bools) for name, bools in kept.items()}

    def check_bits(self, recipe: Recipe, masks: Masks, theta: Theta) -> None:
        """Refuse bits that mask tensors out of scope, or drop another number of weights than the
        ratio.
        """
        scope, per, _, _ = self._read(recipe)
        sizes = sizes_of(masks, theta, scope)
        dropped = {name: size - masks[name].count() for name, size in sizes.items()}
        if per == "global":
            sizes = {"all tensors": sum(sizes.values())}
            dropped = {"all tensors": sum(dropped.values())}
        for name, size in sizes.items():
            wanted = turns.dropped_count(turns.as_fraction(recipe.keep), size)
            if dropped[name] != wanted:
                raise RecipeError(
                    f"recipe: the bits drop {dropped[name]} of {size} in {name}; "
                    f"keep = {recipe.keep:g} means {wanted}"
                )

    def _deals(self, theta: Theta, ratios: list[Fraction], per: str) -> dict[str, turns.Deal]:
        made_of: list[object] = [
            per,
            ratios,
            list(theta),
            [value._version for value in theta.values()],
        ]
        values = list(theta.values())
        if self._dealt is not None:
            before, tensors, deals = self._dealt
            same = len(tensors) == len(values) and all(map(_is, tensors, values))
            if same and before == made_of:
                return deals
        deals = turns.deal_all(theta, ratios, per)
        self._dealt = made_of, values, deals
        return deals

    @staticmethod
    def _read(recipe: Recipe) -> tuple[str, str, list[Fraction], int]:
        """Return scope, per, every worker's ratio by its place, and the worker's place."""
        *_, scope, per, flat, place = recipe.read(
            unit=("weights",),
            by=("magnitude",),
            scope=SCOPES,
            per=PER,
            ratios=(),
            place=range(MOST_WORKERS),
        )
        triples = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        legal = len(flat) % 3 == 0 and all(
            0 <= top <= bottom <= turns.FINEST and bottom > 0 and count > 0
            for top, bottom, count in triples
        )
        if not legal or sum(count for *_, count in triples) > MOST_WORKERS:
            raise RecipeError(f"recipe: ratios = {flat[:30]} are not ratios of workers")
        ratios = [Fraction(top, bottom) for top, bottom, count in triples for _ in range(count)]
        if place >= len(ratios) or ratios[place] != turns.as_fraction(recipe.keep):
            raise RecipeError(
                f"recipe: at place = {place} there is no worker with keep = {recipe.keep:g}"
            )
        return scope, per, ratios, place


def _is(one: object, other: object) -> bool:
    return one is other
