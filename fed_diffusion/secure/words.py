"""What is summed of an update: its words, whole numbers modulo 2^64 for every kept coordinate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.aggregation.exact import SCALE
from fed_diffusion.aggregation.stateful import LEVELS
from fed_diffusion.masks.recipe import Numbers
from fed_diffusion.protocol.divergence import FIRST_LOSS
from fed_diffusion.protocol.errors import DivergedError, UpdateError
from fed_diffusion.protocol.moments import FIRST, SECOND, parameter_of

Word = tuple[str, int]
"""A tensor of theta or of the optimiser's state, and which part of its fixed-point values."""
NUMBERS = "numbers"
"""The tensor of what a client measures, where that is summed."""
SECONDS = 2.0**20
"""The unit in which seconds are summed is 1 / 2^20."""
MEASURED = ("loss", "holdout_loss", "images", "examples", "seconds", FIRST_LOSS)
"""The numbers of an update that do not travel in the clear where they are summed."""


def words_of(theta: Mapping[str, Tensor], shared: bool) -> list[Word]:
    """Return the words of an update, those of a tensor of theta side by side.

    Parameters
    ----------
    shared
        Whether the optimiser's state goes along. Then every value has all the parts that
        `StatefulMean` may need, so that their number tells nothing of it.
    """
    parts, levels = (("", FIRST, SECOND), LEVELS) if shared else (("",), 1)
    found: list[Word] = []
    for name in theta:
        if name == NUMBERS:
            found.append((name, 0))
        else:
            found += [(part + name, level) for part in parts for level in range(levels)]
    return found


def tensor_of(word: Word) -> str:
    """Return the tensor of theta whose mask and shape a word has."""
    return parameter_of(word[0])


def with_numbers(theta: Mapping[str, Tensor], summed: bool) -> dict[str, Tensor]:
    """Return theta, and a tensor for what clients measure, where that is summed."""
    more = {NUMBERS: torch.zeros(5, device="meta")} if summed else {}
    return {**theta, **more}


def summed_numbers(numbers: Numbers, whole: bool, workers: int) -> np.ndarray:
    """Return what a client has measured, as words.

    Parameters
    ----------
    whole
        Whether every client keeps the whole network: only then held-out losses are of one model.

    Raises
    ------
    UpdateError
        A number is not finite, or beyond the client's share.
    """
    held = numbers.get("holdout_loss") if whole else None
    found = [
        float(numbers["loss"]) * SCALE,  # type: ignore[arg-type]
        0.0 if held is None else float(held) * SCALE,  # type: ignore[arg-type]
        float(held is not None),
        float(numbers["images"]),  # type: ignore[arg-type]
        float(numbers["seconds"]) * SECONDS,  # type: ignore[arg-type]
    ]
    plausible = all(0 <= value < 2.0**62 / workers for value in found[:2])
    if FIRST_LOSS in numbers or not plausible:
        raise DivergedError("its training diverged, or its losses are beyond its share of the sums")
    if not all(0 <= value < 2.0**62 / workers for value in found):
        raise UpdateError("what it has measured is out of range")
    return np.rint(found).astype(np.int64)


def means_of(sums: Tensor, clients: int) -> tuple[float, float | None, int, float]:
    """Return the mean loss, the mean held-out loss if any, all images, and the mean seconds."""
    loss, held, holders, images, seconds = (int(value) for value in sums)
    heldout = held / SCALE / holders if holders else None
    return loss / SCALE / clients, heldout, images, seconds / SECONDS / clients
