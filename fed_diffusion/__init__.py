"""Federated training of diffusion models across machines of unequal resources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fed_diffusion.generate import Sampler


def load(run: str, **options: Any) -> Sampler:
    """The trained model of a run directory, ready to sample: see `generate.Sampler`."""
    from fed_diffusion.generate import Sampler

    return Sampler.from_run(run, **options)
