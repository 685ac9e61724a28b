"""Quality figures of the images that a run's model generates."""

from __future__ import annotations

from typing import Any

import torch

from fed_diffusion.common.compute import device_of
from fed_diffusion.data import (
    ImageSet,
)
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.generate import Sampler


def measure(sampler: Sampler, images: torch.Tensor, dataset: ImageSet | None) -> dict[str, Any]:
    """Quality figures of generated images against the configured reference, or why there are none.

    Parameters
    ----------
    images
        uint8 [n, C, H, W].
    dataset
        The run's own data, where the server has it.
    """
    config = sampler.config
    reference = reference_set(config, dataset)
    nfe = sampler.evaluations()
    if reference is None:
        why = "evaluation.reference is none: the server has no images to compare with"
        return no_quality(why, len(images), nfe)
    if len(images) == 0:
        return no_quality("evaluation.samples is 0", 0, nfe)
    from fed_diffusion.evaluation.quality import evaluate  # torch-fidelity takes seconds to import

    device = str(device_of(config))
    return evaluate(
        images,
        reference.images,
        config.evaluation,
        seed=config.seed,
        nfe=nfe,
        device=device,
        teacher=reference.teacher,
        holdings=reference.holdings,
    )
