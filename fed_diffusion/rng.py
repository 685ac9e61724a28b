"""Randomness that depends on what it is for, and on nothing else.

Every draw in a run is a function of (run seed, round, client, purpose) through NumPy's
counter-based Philox generator: never of arrival order, process or device count. NumPy guarantees
the raw stream of words on every machine; masks use only that.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream is for; the numbers are part of a run's identity and never change."""

    INIT = 1
    PARTITION = 2
    PARTICIPATION = 3
    MASK = 4
    BATCHES = 5
    NOISE = 6
    DROPOUT = 7
    HOLDOUT = 8
    SAMPLES = 9
    GRID = 10
    EVALUATION = 11
    ROUNDING = 12
    ROUNDING_DOWN = 13
    SKETCH = 14
    DIAGNOSTIC = 15


def philox(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Philox:
    """The raw stream for one purpose in one round of one client."""
    return np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, round, client])


def generator(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    """NumPy distributions on `philox`'s stream."""
    return np.random.Generator(philox(seed, purpose, round, client))


def torch_seed(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed for a torch generator, taken from the stream's first word."""
    return int(philox(seed, purpose, round, client).random_raw()) >> 1


def torch_generator(
    seed: int,
    purpose: Purpose,
    round: int = 0,
    client: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A torch generator on `device`, seeded by `torch_seed`."""
    return torch.Generator(device).manual_seed(torch_seed(seed, purpose, round, client))
