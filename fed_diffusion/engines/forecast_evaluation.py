"""What sampling and measuring would take, from timed calls of the network and of the judges."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.config import Config
from fed_diffusion.data import ImageSet
from fed_diffusion.engines.timing import SIDE_BY_SIDE, TIMED_S, makespan, multiply_adds, took
from fed_diffusion.evaluation import features
from fed_diffusion.evaluation.choice import INCEPTION, choices
from fed_diffusion.evaluation.extractors import Eyes, Unavailable, extractor_of
from fed_diffusion.evaluation.generated import images_needed
from fed_diffusion.evaluation.reference import reference_set
from fed_diffusion.finish import SMALL
from fed_diffusion.generate import Sampler

INCEPTION_MACS = 5.7e9
"""The multiply-adds of the Inception network for one image."""
LOOKED_AT = 128
"""The most images that a judge is timed with."""
FIGURES_S, FEATURES_A_SECOND = 0.4, 500.0
"""What all figures and the floor take on two cores, for a thousand images: these seconds, and one
for so many features. Within a quarter for 2,800 to 15,000 images of 64 to 2,048 features."""


def evaluation_seconds(
    run: Config | Setup, dataset: ImageSet | None, rounds: int = 0
) -> dict[str, float]:
    """Return the seconds of sampling and measuring, from one timed call of the network.

    Parameters
    ----------
    run
        The configuration of the run, or the setup that was made of it.
    rounds
        Rounds before it, with their small grids; 0: `fed-diffusion evaluate`, without a grid.
    """
    setup = Setup.of(run)
    settings = setup.config.evaluation
    needed = images_needed(settings)
    shown = settings.grid if rounds else 0
    num = max(shown, needed)
    sampler = Sampler(setup, setup.theta(started=False))
    batch = min(settings.batch, max(num, SMALL))
    call = _score_seconds(sampler, batch)
    calls = sampler.calls(setup.sampling_times())
    cores = usable_cores() if sampler.device.type == "cpu" else 1
    sizes = [min(batch, num - start) for start in range(0, num, batch)]
    at_once = SIDE_BY_SIDE if min(cores, len(sizes)) > 1 else 1.0
    sampling = at_once * makespan([n * calls * call for n in sizes], cores)
    small = (rounds - 1) // settings.every if settings.every and rounds else 0
    sampling += small * SMALL * calls * call
    measuring = 0.0
    if needed:
        measuring = _figures_seconds(
            setup, dataset, needed, multiply_adds(setup, sampler.network) / call
        )
    return {"sampling": sampling, "measuring": measuring}


def _score_seconds(sampler: Sampler, batch: int) -> float:
    """Return the seconds of one call of the score, for each image of a batch."""
    noise = torch.Generator(sampler.device).manual_seed(0)
    labels = None
    if sampler.classes is not None:
        labels = torch.arange(batch, device=sampler.device) % sampler.classes

    def call(n: int) -> Callable[[], Any]:
        y = torch.randn((n, *sampler.shape), generator=noise, device=sampler.device)
        u = torch.ones(n, dtype=torch.float64, device=sampler.device)
        chosen = None if labels is None else labels[:n]
        score = sampler.score(chosen, sampler.config.evaluation.guidance)
        return lambda: score(y, u).sum().item()

    threads = 1 if sampler.device.type == "cpu" else torch.get_num_threads()
    with torch.no_grad(), pinned_threads(threads), kernels(sampler.config.worker, sampler.device):
        few = min(SMALL, batch)
        call(few)()
        each = took(call(few))[1] / few
        if each * batch < TIMED_S:
            took(call(batch))
            each = took(call(batch))[1] / batch
    return each


def _figures_seconds(setup: Setup, dataset: ImageSet | None, images: int, rate: float) -> float:
    """Seconds of the judges and of the figures; `rate` is the network's multiply-adds/s."""
    reference = reference_set(setup, dataset)
    if reference is None:
        return 0.0
    seen = images + len(reference.images)
    teacher, seed, seconds = reference.teacher, setup.config.seed, 0.0
    for choice in choices(setup.config.evaluation, setup.shape):
        looking, width = 0.0, features.FEATURES
        if choice.name == INCEPTION:  # its weights may have to be downloaded first
            looking, width = seen * INCEPTION_MACS / rate / usable_cores(), 2048
        elif choice.name == "classifier" and choice.settings.weights is None:
            looking = _classifier_seconds(teacher, seen, seed)
        else:
            with suppress(Unavailable):
                eyes = extractor_of(choice.settings, teacher, seed).make(setup.device)
                looking, width = _looking_seconds(eyes, reference.images.images, seen)
        seconds += looking + seen / 1000 * (FIGURES_S + width / FEATURES_A_SECOND)
    return seconds


def _looking_seconds(eyes: Eyes, images: Tensor, seen: int) -> tuple[float, int]:
    """Return what a judge needs for so many images, and the number of its features."""
    some = images[: usable_cores()]
    eyes.look(some)
    (found, _), one = took(lambda: eyes.look(some))
    more = images[: max(len(some), min(LOOKED_AT, int(len(some) * TIMED_S / max(one, 1e-3))))]
    return seen * min(one / len(some), took(lambda: eyes.look(more))[1] / len(more)), found.shape[1]


def _classifier_seconds(teacher: ImageSet, seen: int, seed: int) -> float:
    """Return what it takes to train a classifier and to show it so many images."""
    few = min(len(teacher), 4 * features.BATCH)
    part = teacher.subset(np.linspace(0, len(teacher) - 1, few).astype(np.int64))
    if features.labels_missing(part) is not None:
        return 0.0
    features.train_classifier(part, seed, 1)
    step = took(lambda: features.train_classifier(part, seed, 1))[1] / math.ceil(
        few / features.BATCH
    )
    per_epoch = math.ceil(len(teacher) / features.BATCH)
    epochs = max(features.EPOCHS, math.ceil(features.FEWEST_STEPS / per_epoch))
    return step * (epochs * per_epoch + seen / features.BATCH / 3)
