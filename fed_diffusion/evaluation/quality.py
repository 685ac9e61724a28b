"""Quality of generated images: FID, KID, Inception Score, precision and recall, memorisation.

The figures are torch-fidelity's: its functions are called as its `calculate_metrics` calls them,
and the tests hold the results equal. They are called one by one so that the features of the
reference set are computed once, serve `fid_floor` too, and are kept on disk.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config.schema import EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation.cache import cached
from fed_diffusion.evaluation.checks import (
    FEWEST_IMAGES,
    OWN_DATA,
    check_evaluation,
    no_quality,
)
from fed_diffusion.evaluation.choice import Choice, choices
from fed_diffusion.evaluation.extractors import (
    RESIZING,
    Extractor,
    Eyes,
    Unavailable,
    extractor_of,
)
from fed_diffusion.evaluation.features import (
    Fingerprinted,
    fingerprint,
    reproducible,
    require_images,
)
from fed_diffusion.evaluation.figures import fid_floor, figures, frechet_distance
from fed_diffusion.evaluation.memorisation import Holdings, memorisation

__all__ = [
    "Unavailable",
    "check_evaluation",
    "evaluate",
    "fid_floor",
    "frechet_distance",
    "no_quality",
]

FEWEST_REFERENCE = 2 * FEWEST_IMAGES  # the floor halves it
LARGEST = 1e5
"""The largest feature: KID's kernel takes the sixth power, and float32 ends at 3e38."""


def evaluate(
    images: Tensor,
    reference: ImageSet,
    config: EvaluationConfig,
    *,
    seed: int,
    nfe: int,
    device: torch.device | str = "cpu",
    teacher: ImageSet | None = None,
    holdings: Holdings | None = None,
) -> dict[str, Any]:
    """Compare generated images with a reference set.

    Parameters
    ----------
    images
        Generated images, uint8 [n, C, H, W].
    reference
        Real images.
    config
        Which extractors, and the files of their weights.
    seed
        The seed of the classifier, of the floor's splits and of the intervals' groups. Figures
        compare only at the same seed.
    nfe
        Network evaluations per image, for the record.
    device
        Where the features are computed.
    teacher
        Labelled images that a classifier without `config.weights` is trained on; default: the
        reference.
    holdings
        Which images each client trained on, where the server has them.

    Returns
    -------
    dict
        fid, fid_floor, inception_score [mean, std over 10 splits], kid, precision, recall,
        intervals (95 %, and how), memorisation (see there), samples, reference, split, extractor,
        extractor_sha256, extractor_because (why it was taken in Inception's place), nfe, seed, why.
        Where there can be no figures they are None and `why` is the reason; else `why` is None.
        These figures are the first extractor's; `others` has `JUDGED` of each further one by name.

    Raises
    ------
    TypeError
        `images` are not uint8 [n, 1 or 3, H, W].
    ConfigError
        `config.weights` names no usable file, or a judge is not installed.
    """
    require_images(images)
    images, name = images.cpu(), reference.name or "images"
    teacher = reference if teacher is None else teacher
    named = [
        (choice, extractor_of(choice.settings, teacher, seed))
        for choice in choices(config, tuple(reference.images.shape[1:]))
    ]
    stated: dict[str, Any] = {
        "seed": seed,
        "reference": f"{name} ({len(reference)} images)",
        "split": config.reference if config.reference in OWN_DATA else "folder",
        "sampler": config.sampler,
        "guidance": config.guidance,
        "memorisation": memorisation(images, holdings, device),
    }
    first, *further = [
        _judged(choice, extractor, images, reference, seed, str(device))
        for choice, extractor in named
    ]
    names = [choice.name for choice, _ in named[1:]]
    stated["others"] = dict(zip(names, further, strict=True))
    return {**no_quality("", len(images), nfe, **stated), **first}


JUDGED = (
    *("fid", "fid_floor", "inception_score", "kid", "precision", "recall", "intervals"),
    *("extractor", "extractor_sha256", "extractor_because", "why"),
)
"""The keys of `evaluate` that belong to one judge."""


def _judged(
    choice: Choice,
    extractor: Extractor,
    images: Tensor,
    reference: ImageSet,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Return `JUDGED` of one judge: its figures, or why there are none."""
    found: dict[str, Any] = dict.fromkeys(JUDGED)
    found |= {"extractor": extractor.shown, "extractor_because": choice.because}
    try:
        _check_comparable(images, reference, extractor)
        judge = _judge(fingerprint(reference), extractor, device)
        found["extractor"] = judge.eyes.shown
        found |= judge.figures(images, seed)
    except Unavailable as reason:
        return found | {"why": str(reason)}
    found["fid_floor"] = judge.floor(min(len(images), len(reference) // 2), seed)
    return found | {"extractor_sha256": judge.eyes.sha256}


def _check_comparable(images: Tensor, reference: ImageSet, extractor: Extractor) -> None:
    """Raise `Unavailable` where these two sets have no figures."""
    if len(images) < FEWEST_IMAGES:
        raise Unavailable(
            f"{len(images)} generated images are too few (evaluation.samples >= {FEWEST_IMAGES})"
        )
    if len(reference) < FEWEST_REFERENCE:
        raise Unavailable(
            f"the reference set has {len(reference)} images, at least {FEWEST_REFERENCE} are needed"
        )
    if extractor.kind not in RESIZING and images.shape[1:] != reference.images.shape[1:]:
        raise Unavailable(
            f"generated images are {list(images.shape[1:])} and the reference's "
            f"{list(reference.images.shape[1:])}; a classifier compares only images of one shape; "
            "evaluation.extractor=inception or efficientnet_lite0 resizes them"
        )


class Comparison:
    """An extractor together with its features of a reference set."""

    def __init__(self, eyes: Eyes, key: Fingerprinted, device: torch.device) -> None:
        self.eyes = eyes
        self.device = device
        images = key.reference.images

        def compute() -> Tensor:
            return self.seen(images)[0]

        name = f"{key.fingerprint}-{eyes.sha256}-{eyes.layer}-{device.type}"
        self.real = cached(name, len(images), compute) if eyes.kept else compute()
        self._floors: dict[tuple[int, int], float] = {}

    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [n, d] and logits [n, classes] of uint8 [n, C, H, W], on the CPU.

        Raises
        ------
        Unavailable
            The features are not finite, or so large that the figures would not be.
        """
        with _current(self.device), reproducible():
            found = self.eyes.look(images)
        # NaN fails every comparison
        if not all(bool((layer.abs() <= LARGEST).all()) for layer in found):
            raise Unavailable(
                f"the extractor sees values that are not finite, or above {LARGEST:g}, in the "
                "images: its training diverged, or its weights are damaged; set evaluation.weights "
                "to others"
            )
        return found

    def figures(self, images: Tensor, seed: int) -> dict[str, Any]:
        """Return `figures` of uint8 [n, C, H, W] against the reference."""
        return figures(*self.seen(images), self.real, seed, self.device)

    def floor(self, side: int, seed: int) -> float:
        """Return `fid_floor` of the reference, and remember it."""
        if (side, seed) not in self._floors:
            self._floors[side, seed] = fid_floor(self.real, side, seed)
        return self._floors[side, seed]


@lru_cache(maxsize=3)  # each of a run's few judges is asked again by the next run of a sweep
def _judge(key: Fingerprinted, extractor: Extractor, device: str) -> Comparison:
    place = torch.device(device)
    with _current(place):
        return Comparison(extractor.make(place), key, place)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the device the current one: torch-fidelity knows only "cuda"."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
