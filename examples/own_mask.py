"""A mask family of the user's own: of every few neighbouring weights the largest are kept.

    fed-diffusion run digits --set pruning.kind=examples.own_mask:Neighbours --set pruning.level=S
    fed-diffusion run digits --set pruning.kind=examples.own_mask:Neighbours \
        --set pruning.keep=0.5 --set 'pruning.options={of: 2}'

The contract is `fed_diffusion.Family`. With a keep ratio of 0.5 and of: 4 this is the 2:4 pattern
that GPUs know how to speed up. Which weights are the largest only the server knows, so it sends
the masks' bits along (`sends_bits`). All clients of one ratio keep the same weights, so it derives
their mask once (`shared`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from fed_diffusion import Family, Masks, Recipe, Scattered
from fed_diffusion.config.schema import PruningConfig


class Neighbours(Family):
    """Masks for tensors of two or more dimensions; `pruning.options` has `of`, 4 by default."""

    sends_bits = True
    shared = True

    def __init__(self, pruning: PruningConfig, seed: int):
        options = {"of": 4, **pruning.options}
        if options.keys() != {"of"} or options["of"] not in range(2, 65):
            raise ValueError(f"pruning.options = {pruning.options}; it has `of`, from 2 to 64")
        self.kind, self.options = pruning.kind, options

    def plan(
        self, round: int, keeps: Mapping[int, float], theta: Mapping[str, Tensor], spaces: object
    ) -> dict[int, Recipe]:
        return {
            client: Recipe(self.kind, keep, round=round, client=client, options=self.options)
            for client, keep in keeps.items()
        }

    def derive(self, recipe: Recipe, theta: Mapping[str, Tensor], spaces: object) -> Masks:
        (of,) = recipe.read(of=range(2, 65))
        kept = max(1, round(recipe.keep * of))
        return {n: Scattered(largest(v, of, kept)) for n, v in theta.items() if v.dim() > 1}


def largest(value: Tensor, of: int, kept: int) -> Tensor:
    """Return True at the `kept` largest magnitudes of every `of` neighbours; ties go to the
    first.
    """
    groups = pad(value.abs().flatten(), (0, -value.numel() % of), value=-1.0).view(-1, of)
    order = groups.argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < kept).flatten()[: value.numel()].view(value.shape)
