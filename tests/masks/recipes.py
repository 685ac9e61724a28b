"""Recipes of the built-in families for tests, and the masks that follow from them alone."""

from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks.families import derive, family_of
from fed_diffusion.masks.recipe import Recipe

OPTIONS = {
    "full": {},
    "random": {"scope": "weights"},
    "topk": {"scope": "weights", "per": "tensor"},
    "balanced": {"unit": "weights", "scope": "weights", "per": "tensor", "start": 0, "end": 0},
    "channels": {"choice": "ordered"},
}


def recipe_of(kind, keep, *, seed=0, round=0, client=0, **options):
    """A recipe with the family's options as they are by default, but for those that are given."""
    mine = OPTIONS[kind] | {name: value for name, value in options.items() if name in OPTIONS[kind]}
    bits = kind in ("topk", "balanced")
    return Recipe(kind, keep, seed, round, client, mine, needs_bits=bits)


def masks_of(recipe, theta, layout=None):
    """The masks, by a family that knows nothing of the run but the kind."""
    pruning = PruningConfig(kind=recipe.kind, unit=recipe.options.get("unit", "weights"))
    return derive(family_of(pruning, 0), recipe, theta, layout)
