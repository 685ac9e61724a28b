"""A mask family says who keeps what: the contract of what pruning.kind names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from fed_diffusion.config.training import PruningConfig
from fed_diffusion.masks.mask import Masks
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.masks.spaces import Layout


@runtime_checkable
class Family(Protocol):
    """A mask family decides which values each client trains: the contract of what pruning.kind
    names.

    A user's family inherits from this class. The server plans a round, and both the server and the
    client derive the mask of a recipe. Both must come to the same bits: all that is random starts
    from the recipe's seed, round and client (`common.rng.philox`), and nothing is remembered
    between rounds, because a run can be resumed.

    Attributes
    ----------
    sends_bits
        Whether a mask depends on theta's values, which a client does not have: then the server
        sends the mask's bits, an eighth of a byte for each weight in the masked tensors.
    shrinks
        Whether whole channels are dropped, so that a client's network is smaller: then masks are
        `Block`s, as `spaces.blocks` makes them. Otherwise they are `Scattered`.
    shared
        Whether all clients of one keep ratio have the same mask in a round, so that the server
        derives it once.
    """

    sends_bits: bool = False
    shrinks: bool = False
    shared: bool = False

    def plan(
        self,
        round: int,
        keeps: Mapping[int, float],
        theta: Mapping[str, Tensor],
        spaces: Layout | None,
    ) -> dict[int, Recipe]:
        """Return the recipe of every client that does not keep everything.

        Parameters
        ----------
        round
            The number of the round, from 1.
        keeps
            Client -> keep ratio, above 0 and below 1; in the order of the clients' numbers.
        theta
            theta_r by name, float32 on the CPU; it must not be changed.
        spaces
            The network's channel spaces where the family shrinks it, else None.

        Returns
        -------
        dict
            Client -> its recipe, with `kind` as in pruning.kind, and the given round, client and
            keep ratio. `options` holds whatever else `derive` needs.
        """
        ...

    def derive(self, recipe: Recipe, theta: Mapping[str, Tensor], spaces: Layout | None) -> Masks:
        """Return the masks that a recipe describes, by tensor name; unnamed tensors are kept whole.

        Parameters
        ----------
        recipe
            One that `plan` has made, after a message has carried it.
        theta
            theta_r. On a client only names and shapes count, unless the family `sends_bits`; then
            no client calls this.
        spaces
            As for `plan`.

        Raises
        ------
        RecipeError
            The recipe describes no mask of this network.
        """
        ...

    def check_bits(self, recipe: Recipe, masks: Masks, theta: Mapping[str, Tensor]) -> None:
        """On a client, refuse bits that cannot belong to the recipe; only theta's shapes count.

        Raises
        ------
        RecipeError
            The message says what is wrong. A family need not check anything.
        """
        return None


class FamilyFactory(Protocol):
    """What pruning.kind names: a class of families, or a function that makes one.

    The server and every client each call this, with the same arguments.

    Parameters
    ----------
    pruning
        The section `pruning` of the configuration; `pruning.options` is for a family of the user's
        own. Options that cannot be are refused here, by any exception.
    seed
        The run's seed, for the recipes of masks that are drawn.
    """

    def __call__(self, pruning: PruningConfig, seed: int, /) -> Family: ...
