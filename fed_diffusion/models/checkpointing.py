"""Gradient checkpointing: a network's blocks are computed again in the backward pass.

A network that can do so offers `enable_gradient_checkpointing()` and
`disable_gradient_checkpointing()`, as networks of diffusers do. What is drawn inside a block, as
dropout is, has to be the same both times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

METHODS = ("enable_gradient_checkpointing", "disable_gradient_checkpointing")
"""What a network offers whose blocks can be computed again."""


def can_checkpoint(network: nn.Module) -> bool:
    """Return whether the blocks of a network can be computed again."""
    return all(callable(getattr(network, method, None)) for method in METHODS)


@contextmanager
def checkpointed(network: Any, wanted: bool) -> Iterator[None]:
    """Inside, where that is wanted, a network keeps only what its blocks are given.

    Afterwards it keeps everything again: what measures second derivatives counts on that.
    """
    if not wanted:
        yield
        return
    network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()
