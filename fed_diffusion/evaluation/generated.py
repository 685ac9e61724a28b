"""Images that a run's model generates, their quality figures, and the record of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fed_diffusion.config.schema import EvaluationConfig
from fed_diffusion.data import ImageSet
from fed_diffusion.evaluation import no_quality
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.generate import Sampler

UNFINISHED = "the evaluation did not finish; fed-diffusion evaluate RUN does it again"
Told = Callable[[str, float, int], None]
"""A function that is called with what is done now, and how much of how much is done if known."""


def images_needed(settings: EvaluationConfig) -> int:
    """How many images the figures are of: none where there is nothing to compare them with."""
    return 0 if settings.reference == "none" else settings.samples


def evaluate(
    sampler: Sampler,
    dataset: ImageSet | None,
    *,
    grid: Callable[[torch.Tensor], None] | None = None,
    told: Told | None = None,
) -> dict[str, Any]:
    """Draw the images that somebody uses, and measure them; returns the figures.

    Parameters
    ----------
    dataset
        The run's own data, where the server has it.
    grid
        A function that is called with the first evaluation.grid images as soon as they are drawn,
        before the others are. Without this function, images are drawn only for the figures.
    told
        A function that is told how far the work is.
    """
    config = sampler.config
    shown = config.evaluation.grid if grid is not None else 0
    needed = images_needed(config.evaluation)
    num = max(shown, needed)
    tell: Told = told or (lambda doing, done, of: None)
    images, here = [torch.empty((0, *sampler.pixels), dtype=torch.uint8)], 0
    for part in sampler.batches(num, progress=lambda done: tell("sampling", done, num)):
        before, here = here, here + len(part)
        images.append(part)
        if grid is not None and before < shown <= here:
            grid(torch.cat(images)[:shown])
    if needed:
        tell("measuring", 0.0, 0)
    return measure(sampler, torch.cat(images)[:needed], dataset)


def evaluation_entry(
    settings: EvaluationConfig, round: int, quality: dict[str, Any]
) -> dict[str, Any]:
    """A line of evaluations.jsonl: the figures of a model, and how and when they came about."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "round": round,
        "settings": settings.model_dump(mode="json"),
        "quality": quality,
    }


def measure(sampler: Sampler, images: torch.Tensor, dataset: ImageSet | None) -> dict[str, Any]:
    """Return quality figures of generated images against the reference, or why there are none.

    Parameters
    ----------
    images
        uint8 [n, C, H, W].
    dataset
        The run's own data, where the server has it.
    """
    config = sampler.config
    reference = reference_set(sampler.setup, dataset)
    nfe = sampler.evaluations()
    if reference is None:
        why = "evaluation.reference is none: the server has no images to compare with"
        return no_quality(why, len(images), nfe)
    if len(images) == 0:
        return no_quality("evaluation.samples is 0", 0, nfe)
    from fed_diffusion.evaluation.quality import evaluate  # torch-fidelity takes seconds to import

    return evaluate(
        images,
        reference.images,
        config.evaluation,
        seed=config.seed,
        nfe=nfe,
        device=str(sampler.device),
        teacher=reference.teacher,
        holdings=reference.holdings,
    )
