"""Randomness that depends on what it is for, and on nothing else.

Every draw in a run is a function of (run seed, round, client, purpose) through NumPy's
counter-based Philox generator: never of arrival order, process or device count. NumPy guarantees
the raw stream of words on every machine; masks use only that.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

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
    PROBE = 16
    AUGMENTATION = 17
    ROUNDING_STATE = 18
    ROUNDING_STATE_DOWN = 19
    ADAPTER = 20


def philox(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Philox:
    """Return the raw stream for one purpose in one round of one client."""
    return np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, round, client])


def generator(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    """Return NumPy distributions on `philox`'s stream."""
    return np.random.Generator(philox(seed, purpose, round, client))


def torch_seed(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> int:
    """Return a 63-bit seed for a CUDA generator, taken from the stream's first word."""
    return int(philox(seed, purpose, round, client).random_raw()) >> 1


def torch_generator(
    seed: int,
    purpose: Purpose,
    round: int = 0,
    client: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """Return a torch generator on `device` whose whole state comes from `philox`'s stream.

    A CPU generator's `manual_seed` uses 32 bits of its seed: among 300 rounds of 1,000 clients some
    ten pairs would draw the same noise. A CUDA generator (Philox, too) uses all 64.
    """
    made = torch.Generator(device)
    if made.device.type == "cpu":
        return made.set_state(_cpu_state(philox(seed, purpose, round, client)))
    return made.manual_seed(torch_seed(seed, purpose, round, client))


def seed_torch(
    seed: int, purpose: Purpose, round: int = 0, client: int = 0, *, cuda: bool = True
) -> None:
    """Seed torch's own generators, which start values and dropout use.

    Parameters
    ----------
    cuda
        Whether the generators of GPUs are seeded too; if not, only the CPU's is.
    """
    if cuda:
        torch.manual_seed(torch_seed(seed, purpose, round, client))
    torch.default_generator.set_state(_cpu_state(philox(seed, purpose, round, client)))


# --- the state of a CPU generator, which is a Mersenne Twister's ---------------------------------

_WORDS = 624
_WHERE = slice(24, 24 + 8 * _WORDS)
"""The bytes of torch's state that hold the words, each in 64 bits, after seed and position."""


def _cpu_state(stream: np.random.Philox) -> torch.Tensor:
    """Return a fresh generator's state with the stream's words in it."""
    state = _fresh_state().clone()
    words = np.asarray(stream.random_raw(_WORDS // 2)).astype("<u8").view("<u4")
    state[_WHERE] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    return state


@cache
def _fresh_state() -> torch.Tensor:
    """Return the state after `manual_seed(0)`, which is checked to lie in memory as `_WHERE`
    says.
    """
    state = torch.Generator().manual_seed(0).get_state()
    twister = np.random.RandomState(0).get_state(legacy=False)
    expected = twister["state"]["key"].astype(np.uint64).view(np.uint8)
    if not np.array_equal(state[_WHERE].numpy(), expected):
        raise RuntimeError(
            f"torch {torch.__version__} keeps the state of a CPU generator in another form than "
            "torch 2.5 to 2.14, so its seeds would have 32 bits; use one of these, and report this."
        )
    return state
