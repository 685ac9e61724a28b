"""Quality of generated images: FID, KID, Inception Score, precision and recall, memorisation.

The figures are torch-fidelity's: its functions are called as its `calculate_metrics` calls them,
and the tests hold the results equal. They are called one by one so that the features of the
reference set are computed once, serve `fid_floor` too, and are kept on disk.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from fed_diffusion.config.schema import EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation.cache import cached
from fed_diffusion.evaluation.checks import (
    FEWEST_IMAGES,
    OWN_DATA,
    check_evaluation,
    check_weights,
    no_quality,
)
from fed_diffusion.evaluation.features import (
    CLASSIFIER,
    FEATURES,
    Fingerprinted,
    fingerprint,
    labels_missing,
    reproducible,
    require_images,
    trained_classifier,
    weights_hash,
)
from fed_diffusion.evaluation.figures import fid_floor, figures, frechet_distance
from fed_diffusion.evaluation.memorisation import Holdings, memorisation
from fed_diffusion.evaluation.trained import RESNET, WIDTH, load_features

__all__ = [
    "Unavailable",
    "check_evaluation",
    "evaluate",
    "fid_floor",
    "frechet_distance",
    "no_quality",
]

INCEPTION = "inception-v3-compat"
LAYERS = {
    CLASSIFIER: (str(FEATURES), "logits"),
    RESNET: (str(WIDTH), "logits"),
    INCEPTION: ("2048", "logits_unbiased"),
}
"""Per extractor: what FID and KID compare, what the Inception Score reads."""
BATCH = {CLASSIFIER: 512, RESNET: 512, INCEPTION: 64}
FEWEST_REFERENCE = 2 * FEWEST_IMAGES  # the floor halves it
LARGEST = 1e5
"""Of a feature: KID's kernel takes the sixth power, and float32 ends at 3e38."""
DOWNLOAD_TIMEOUT_S = 30.0  # per connection and read; torch.hub waits for ever


class Unavailable(Exception):
    """There can be no quality figures; the message says why and what to do."""


@dataclass(frozen=True)
class Extractor:
    """Which extractor, as a cache key: two of one kind and identity see the same features.

    Attributes
    ----------
    kind
        Its name with torch-fidelity, a key of `LAYERS`.
    identity
        What its weights come from.
    shown
        Its name in the results.
    make
        Makes it on a device; `Unavailable` where that cannot be done.
    """

    kind: str
    identity: str
    shown: str
    make: Callable[[torch.device], FeatureExtractorBase] = field(compare=False, repr=False)


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
        Which extractor, and the file of its weights.
    seed
        Of the classifier, of the floor's splits and of the intervals' groups: figures compare at
        the same seed.
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
        extractor_sha256, nfe, seed, why. Where there can be no figures they are None and `why` is
        the reason; else `why` is None.

    Raises
    ------
    TypeError
        `images` are not uint8 [n, 1 or 3, H, W].
    ConfigError
        `config.weights` names no usable file.
    """
    require_images(images)
    images, name = images.cpu(), reference.name or "images"
    extractor = _extractor(config, reference if teacher is None else teacher, seed)
    stated: dict[str, Any] = {
        "seed": seed,
        "reference": f"{name} ({len(reference)} images)",
        "split": config.reference if config.reference in OWN_DATA else "folder",
        "extractor": extractor.shown,
        "sampler": config.sampler,
        "guidance": config.guidance,
        "memorisation": memorisation(images, holdings, device),
    }
    try:
        _check_comparable(images, reference, extractor)
        judge = _judge(fingerprint(reference), extractor, str(device))
        found = judge.figures(images, seed)
    except Unavailable as reason:
        return no_quality(str(reason), len(images), nfe, **stated)
    found["fid_floor"] = judge.floor(min(len(images), len(reference) // 2), seed)
    found["why"] = None
    stated["extractor_sha256"] = judge.sha256
    return {**no_quality("", len(images), nfe, **stated), **found}


def _extractor(config: EvaluationConfig, teacher: ImageSet, seed: int) -> Extractor:
    if config.extractor == "inception":
        weights = None if config.weights is None else str(check_weights(config.weights))
        # Inception is the same network at every seed
        return Extractor(INCEPTION, str(weights), INCEPTION, lambda to: _inception(weights, to))
    if config.weights is not None:
        network, header = load_features(config.weights, tuple(teacher.images.shape[1:]))
        shown = f"classifier({header.dataset}, {WIDTH} features, sha256 {header.sha256[:12]})"
        return Extractor(
            RESNET, header.sha256, shown, lambda to: _wrapped(RESNET, network.to(to), to)
        )
    shown = f"classifier({teacher.name or 'images'}, {FEATURES} features)"
    key = fingerprint(teacher)

    def make(device: torch.device) -> FeatureExtractorBase:
        missing = labels_missing(teacher)
        if missing is not None:
            raise Unavailable(f"evaluation.{missing}; use evaluation.extractor=inception")
        return _wrapped(CLASSIFIER, trained_classifier(key, seed, device), device)

    return Extractor(CLASSIFIER, f"{key.fingerprint} {seed}", shown, make)


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
    # Inception resizes what it gets
    if extractor.kind != INCEPTION and images.shape[1:] != reference.images.shape[1:]:
        raise Unavailable(
            f"generated images are {list(images.shape[1:])} and the reference's "
            f"{list(reference.images.shape[1:])}; a classifier compares images of one shape, "
            "evaluation.extractor=inception resizes them"
        )


class Judge:
    """An extractor together with what it sees in a reference set.

    Parameters
    ----------
    extractor
        One of torch-fidelity's, on `device`.
    key
        The reference set. What a classifier trained on the spot sees of it is not kept on disk:
        training it takes longer.
    """

    def __init__(
        self, extractor: FeatureExtractorBase, key: Fingerprinted, device: torch.device
    ) -> None:
        self.extractor = extractor
        self.device = device
        self.sha256 = weights_hash(getattr(extractor, "classifier", extractor))
        kind, images = extractor.get_name(), key.reference.images
        self.compared, self.classified = LAYERS[kind]

        def compute() -> Tensor:
            return self.features(images)[self.compared]

        name = f"{key.fingerprint}-{self.sha256}-{self.compared}-{device.type}"
        self.real = compute() if kind == CLASSIFIER else cached(name, len(images), compute)
        self._floors: dict[tuple[int, int], float] = {}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The extractor's two layers for uint8 [n, C, H, W], on the CPU: {name: [n, d]}.

        Raises
        ------
        Unavailable
            They are not finite, or too large for the figures to be.
        """
        grey_to_rgb = self.extractor.get_name() == INCEPTION
        cuda = self.device.type == "cuda"
        with _current(self.device), reproducible():
            found: dict[str, Tensor] = get_featuresdict_from_dataset(
                _Images(images, grey_to_rgb),
                self.extractor,
                BATCH[self.extractor.get_name()],
                cuda,
                save_cpu_ram=True,  # else it forks loader processes for images in memory
                verbose=False,
            )
        # NaN fails every comparison
        if not all(bool((layer.abs() <= LARGEST).all()) for layer in found.values()):
            raise Unavailable(
                f"the extractor sees values that are not finite, or above {LARGEST:g}, in the "
                "images: its training diverged, or its weights are damaged; set evaluation.weights "
                "to others"
            )
        return found

    def figures(self, images: Tensor, seed: int) -> dict[str, Any]:
        """`figures` of uint8 [n, C, H, W] against the reference."""
        seen = self.features(images)
        return figures(seen[self.compared], seen[self.classified], self.real, seed, self.device)

    def floor(self, side: int, seed: int) -> float:
        """`fid_floor` of the reference, remembered."""
        if (side, seed) not in self._floors:
            self._floors[side, seed] = fid_floor(self.real, side, seed)
        return self._floors[side, seed]


@lru_cache(maxsize=1)
def _judge(key: Fingerprinted, extractor: Extractor, device: str) -> Judge:
    place = torch.device(device)
    with _current(place):
        return Judge(extractor.make(place), key, place)


def _wrapped(kind: str, network: torch.nn.Module, device: torch.device) -> FeatureExtractorBase:
    """A classifier as torch-fidelity takes it."""
    return create_feature_extractor(
        kind, list(LAYERS[kind]), cuda=device.type == "cuda", verbose=False, classifier=network
    )


def _inception(weights: str | None, device: torch.device) -> FeatureExtractorBase:
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return create_feature_extractor(
                INCEPTION,
                list(LAYERS[INCEPTION]),
                cuda=device.type == "cuda",
                verbose=False,
                feature_extractor_weights_path=weights,
            )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no network, a full disk, a cut-off download, other weights
        what = "read" if weights else "downloaded"
        raise Unavailable(
            f"the Inception weights could not be {what} ({type(error).__name__}: {error}); set "
            "evaluation.weights=FILE to a copy, or evaluation.extractor=classifier"
        ) from error


class _Images(Dataset[Tensor]):
    """Images in memory, as torch-fidelity takes them: uint8 [C, H, W], one at a time."""

    def __init__(self, images: Tensor, grey_to_rgb: bool) -> None:
        n, channels, height, width = images.shape
        repeat = grey_to_rgb and channels == 1
        self.images = images.expand(n, 3, height, width) if repeat else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """torch-fidelity knows "cuda" only: make the device asked for the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
