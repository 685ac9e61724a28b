"""FID, KID and the Inception Score of generated images, and all that they depend on.

The figures are torch-fidelity's: its functions are called as its `calculate_metrics` calls them,
and the tests hold the results equal. They are called one by one so that the features of the
reference set are computed once and serve `fid_floor` too.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation.checks import (
    FEWEST_IMAGES,
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
)
from fed_diffusion.rng import Purpose, generator
from fed_diffusion.schema import EvaluationConfig

__all__ = ["Unavailable", "check_evaluation", "evaluate", "fid_floor", "no_quality"]

INCEPTION = "inception-v3-compat"
LAYERS = {CLASSIFIER: (str(FEATURES), "logits"), INCEPTION: ("2048", "logits_unbiased")}
"""Per extractor: what FID and KID compare, what the Inception Score reads."""
BATCH = {CLASSIFIER: 512, INCEPTION: 64}
FLOOR_SPLITS = 10
FEWEST_REFERENCE = 2 * FEWEST_IMAGES  # the floor halves it
DOWNLOAD_TIMEOUT_S = 30.0  # per connection and read; torch.hub waits for ever


class Unavailable(Exception):
    """There can be no quality figures; the message says why and what to do."""


def evaluate(
    images: Tensor,
    reference: ImageSet,
    config: EvaluationConfig,
    *,
    seed: int,
    nfe: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compare generated images with a reference set.

    Parameters
    ----------
    images
        Generated images, uint8 [n, C, H, W].
    reference
        Real images; labelled where `config.extractor` is "classifier".
    config
        Which extractor, and the file of its weights.
    seed
        Of the classifier and of the floor's splits: figures compare at the same seed.
    nfe
        Network evaluations per image, for the record.
    device
        Where the features are computed.

    Returns
    -------
    dict
        fid, fid_floor, inception_score [mean, std over 10 splits], kid, samples, reference,
        extractor, nfe, seed, why. Where there can be no figures they are None and `why` is the
        reason; else `why` is None.

    Raises
    ------
    TypeError
        `images` are not uint8 [n, 1 or 3, H, W].
    ConfigError
        `config.weights` names no usable file.
    """
    require_images(images)
    images, name = images.cpu(), reference.name or "images"
    classifier = config.extractor == "classifier"
    shown = f"classifier({name}, {FEATURES} features)" if classifier else INCEPTION
    stated: dict[str, Any] = {
        "seed": seed,
        "reference": f"{name} ({len(reference)} images)",
        "extractor": shown,
    }
    weights = None
    if config.weights is not None and not classifier:
        weights = str(check_weights(config.weights))
    try:
        _check_comparable(images, reference, classifier)
        # Inception is the same network at every seed
        own_seed = seed if classifier else None
        judge = _judge(fingerprint(reference), own_seed, weights, str(device))
    except Unavailable as reason:
        return no_quality(str(reason), len(images), nfe, **stated)
    floor = judge.floor(min(len(images), len(reference) // 2), seed)
    figures = {**judge.figures(images), "fid_floor": floor, "why": None}
    return {**no_quality("", len(images), nfe, **stated), **figures}


def _check_comparable(images: Tensor, reference: ImageSet, classifier: bool) -> None:
    """Raise `Unavailable` where these two sets have no figures."""
    if len(images) < FEWEST_IMAGES:
        raise Unavailable(
            f"{len(images)} generated images are too few (evaluation.samples >= {FEWEST_IMAGES})"
        )
    if len(reference) < FEWEST_REFERENCE:
        raise Unavailable(
            f"the reference set has {len(reference)} images, at least {FEWEST_REFERENCE} are needed"
        )
    if not classifier:
        return  # Inception resizes what it gets
    missing = labels_missing(reference)
    if missing is not None:
        raise Unavailable(f"evaluation.{missing}; use evaluation.extractor=inception")
    if images.shape[1:] != reference.images.shape[1:]:
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
    reference
        uint8 [m, C, H, W].
    """

    def __init__(
        self, extractor: FeatureExtractorBase, reference: Tensor, device: torch.device
    ) -> None:
        self.extractor = extractor
        self.device = device
        self.compared, self.classified = LAYERS[extractor.get_name()]
        self.real: Tensor = self.features(reference)[self.compared]
        self._floors: dict[tuple[int, int], float] = {}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The extractor's two layers for uint8 [n, C, H, W], on the CPU: {name: [n, d]}."""
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
        return found

    def figures(self, images: Tensor) -> dict[str, Any]:
        """FID, KID and Inception Score of uint8 [n, C, H, W] against the reference."""
        seen = self.features(images)
        generated, n, m = seen[self.compared], len(images), len(self.real)
        fid = fid_statistics_to_metric(
            fid_features_to_statistics(generated), fid_features_to_statistics(self.real), False
        )
        # the default of 1000 fails on smaller sets; KID is unbiased at any subset size
        subset = max(2, min(1000, n // 2, m // 2))
        kid = kid_features_to_metric(generated, self.real, kid_subset_size=subset, verbose=False)
        # of fewer images than splits some splits would be empty
        isc = isc_features_to_metric(seen[self.classified], splits=min(10, n))
        return {
            "fid": fid["frechet_inception_distance"],
            "inception_score": [isc["inception_score_mean"], isc["inception_score_std"]],
            "kid": kid["kernel_inception_distance_mean"],
        }

    def floor(self, side: int, seed: int) -> float:
        """`fid_floor` of the reference, remembered."""
        if (side, seed) not in self._floors:
            self._floors[side, seed] = fid_floor(self.real, side, seed)
        return self._floors[side, seed]


@lru_cache(maxsize=1)
def _judge(key: Fingerprinted, seed: int | None, weights: str | None, device: str) -> Judge:
    """The judge for a reference set; with a seed the classifier, without one Inception."""
    place = torch.device(device)
    with _current(place):
        extractor = _inception(weights, place) if seed is None else _own(key, seed, device)
        return Judge(extractor, key.reference.images, place)


def _own(key: Fingerprinted, seed: int, device: str) -> FeatureExtractorBase:
    return create_feature_extractor(
        CLASSIFIER,
        list(LAYERS[CLASSIFIER]),
        cuda=torch.device(device).type == "cuda",
        verbose=False,
        classifier=trained_classifier(key, seed, device),
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


def fid_floor(features: Tensor, side: int, seed: int) -> float:
    """What real images score against real images: the mean FID over 10 random splits.

    Parameters
    ----------
    features
        Of the reference set, [m, d].
    side
        Images on each side of a split, at most m // 2.
    """
    total = 0.0
    for split in range(FLOOR_SPLITS):
        order = generator(seed, Purpose.EVALUATION, client=2 + split).permutation(len(features))
        total += frechet_distance(features[order[:side]], features[order[side : 2 * side]])
    return total / FLOOR_SPLITS


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID of features [n, d] and [m, d], in float64.

    torch-fidelity's `fid_statistics_to_metric` takes the eigenvalues of a non-symmetric d x d
    matrix, 14 to 33 s for one of Inception's 2048 on two cores, and the floor needs ten. With
    S_a = A^T A and S_b = B^T B, tr sqrt(S_a S_b) is the sum of the singular values of A B^T.
    """
    a, b = a.double(), b.double()
    apart = a.mean(0) - b.mean(0)
    a = (a - a.mean(0)) / math.sqrt(len(a) - 1)
    b = (b - b.mean(0)) / math.sqrt(len(b) - 1)
    # the triangular factor has a's covariance in at most d rows
    rows = torch.linalg.qr(a, mode="r").R if a.shape[0] > a.shape[1] else a
    cross = rows @ b.T
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float(apart.square().sum() + a.square().sum() + b.square().sum() - 2 * overlap)


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
