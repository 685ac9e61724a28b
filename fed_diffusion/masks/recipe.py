"""A mask is described by a few numbers and names, from which both ends derive the same bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Value = int | float | str | tuple[int, ...]
"""The types that an option of a recipe may have."""
Numbers = dict[str, int | float | str | list[int]]
"""The numbers and names that a message carries beside tensors."""

VERSION = 1
"""The version of a recipe's wire form; another version is refused."""
PREFIX = "recipe."
"""The prefix of a recipe's names in a message."""
WHOLE = "full"
"""The kind of a recipe that keeps everything."""
MOST_OPTIONS = 32
MOST_TEXT = 200
MOST_GROUPS = 1 << 20
"""A limit above any number of options, of letters in a name, and of groups that a network has."""


class RecipeError(ValueError):
    """A recipe that came over the network does not describe a legal mask."""


@dataclass(frozen=True)
class Recipe:
    """A recipe describes one client's mask m_{r,n} of one round.

    Attributes
    ----------
    kind
        The mask family's name, as in pruning.kind; `full` where everything is kept.
    keep
        Keep ratio in (0, 1].
    seed, round, client
        Where random streams start.
    options
        What the family itself needs to derive the mask, by name.
    needs_bits
        Whether the mask depends on theta's values, so that its bits travel beside the recipe.
    """

    kind: str = WHOLE
    keep: float = 1.0
    seed: int = 0
    round: int = 0
    client: int = 0
    options: Mapping[str, Value] = field(default_factory=dict)
    needs_bits: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RecipeError(f"recipe: keep = {self.keep}; it must be above 0 and at most 1")
        if min(self.seed, self.round, self.client) < 0:
            raise RecipeError("recipe: seed, round and client must not be negative")
        if len(self.options) > MOST_OPTIONS:
            raise RecipeError(f"recipe: {len(self.options)} options, more than {MOST_OPTIONS}")
        for name, value in self.options.items():
            if name in _COMMON or not name.isidentifier():
                raise RecipeError(f"recipe: {name!r} cannot be the name of an option")
            _check_value(name, value)

    def whole(self) -> bool:
        """Return whether everything is kept."""
        return self.kind == WHOLE

    def read(self, **legal: Collection[Any]) -> tuple[Any, ...]:
        """Return the options' values in the order in which they are named here.

        Parameters
        ----------
        legal
            For every option that the family has, what its value may be: names, or a range of whole
            numbers. An empty collection stands for a list of whole numbers.

        Raises
        ------
        RecipeError
            The recipe has other options than these, or a value that is not legal.
        """
        if odd := sorted(legal.keys() ^ self.options.keys()):
            raise RecipeError(
                f"recipe: {self.kind} has the options {sorted(legal)}; these differ: {odd}"
            )
        for name, allowed in legal.items():
            value = self.options[name]
            fits = value in allowed if len(allowed) else isinstance(value, tuple)
            if not fits or isinstance(value, float):
                raise RecipeError(f"recipe: {name} = {value!r}; allowed: {_in_words(allowed)}")
        return tuple(self.options[name] for name in legal)

    def to_metrics(self) -> Numbers:
        """Return the recipe as numbers and names, as a task and a reply carry it."""
        numbers: Numbers = {
            "recipe.version": VERSION,
            "recipe.kind": self.kind,
            "recipe.keep": self.keep,
            "recipe.seed": self.seed,
            "recipe.round": self.round,
            "recipe.client": self.client,
            "recipe.needs_bits": int(self.needs_bits),
        }
        for name, value in self.options.items():
            numbers[PREFIX + name] = list(value) if isinstance(value, tuple) else value
        return numbers

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Recipe:
        """Undo `to_metrics`, and refuse numbers that it could not have written.

        What an option may be is for the family to say, and the family is the configuration's: a
        message cannot name an option that is not known already, nor a module.
        """
        mine = {k.removeprefix(PREFIX): v for k, v in metrics.items() if k.startswith(PREFIX)}
        if (version := mine.pop("version", None)) != VERSION:
            raise RecipeError(
                f"recipe: recipe.version = {version!r}, and this is {VERSION}: server and clients "
                "must have the same version of fed-diffusion"
            )
        try:
            kind, keep = mine.pop("kind"), float(mine.pop("keep"))
            seed, round, client, bits = (int(mine.pop(name)) for name in _COMMON[3:])
        except KeyError as error:
            raise RecipeError(f"recipe: recipe.{error.args[0]} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"recipe: not readable: {error}") from error
        _check_value("kind", kind)
        if not isinstance(kind, str) or bits not in (0, 1):
            raise RecipeError(f"recipe: kind = {kind!r}, needs_bits = {bits!r} cannot be")
        options = {n: tuple(v) if isinstance(v, list) else v for n, v in mine.items()}
        return cls(kind, keep, seed, round, client, options, bool(bits))

    def differences(self, other: Recipe) -> str:
        """Return where two recipes differ, for an error message."""
        mine, theirs = self._flat(), other._flat()
        names = dict.fromkeys([*mine, *theirs])
        pairs = ((name, mine.get(name), theirs.get(name)) for name in names)
        return ", ".join(f"{name} {one!r} != {two!r}" for name, one, two in pairs if one != two)

    def _flat(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COMMON[1:]} | dict(self.options)


_COMMON = ("version", "kind", "keep", "seed", "round", "client", "needs_bits")


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, tuple):
        if len(value) > MOST_GROUPS or any(type(number) is not int for number in value):
            raise RecipeError(f"recipe: {name} is not a list of whole numbers, or far too long")
    elif isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise RecipeError(f"recipe: {name} has {len(value)} letters, more than {MOST_TEXT}")
    elif type(value) not in (int, float) or not math.isfinite(value):
        raise RecipeError(f"recipe: {name} = {value!r} is neither a number nor a name")


def _in_words(allowed: Collection[Any]) -> str:
    if isinstance(allowed, range):
        return f"{allowed.start} to {allowed.stop - 1}"
    return ", ".join(map(str, allowed)) or "a list of whole numbers"
