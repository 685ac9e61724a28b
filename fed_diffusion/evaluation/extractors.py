"""Every extractor behind one interface: torch-fidelity's, ours, and judges of the user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.network import socket_timeout
from fed_diffusion.common.plugins import blamed
from fed_diffusion.config.schema import ConfigError, EvaluationConfig
from fed_diffusion.data.datasets import ImageSet
from fed_diffusion.evaluation.checks import check_weights
from fed_diffusion.evaluation.choice import INCEPTION as INCEPTION_NAME
from fed_diffusion.evaluation.features import (
    CLASSIFIER,
    FEATURES,
    fingerprint,
    labels_missing,
    trained_classifier,
    weights_hash,
)
from fed_diffusion.evaluation.judge import BATCH as SEEN_AT_ONCE
from fed_diffusion.evaluation.judge import KEY, look, made
from fed_diffusion.evaluation.public import PUBLIC
from fed_diffusion.evaluation.trained import RESNET, WIDTH, load_features
from fed_diffusion.generate import batches_at_once

INCEPTION = "inception-v3-compat"
JUDGE = "judge"
"""The kind of a public judge."""
OWN = "own"
"""The kind of a judge that evaluation.extractor names by module:attribute."""
RESIZING = (INCEPTION, JUDGE)
"""The kinds that take images of any size."""
LAYERS = {
    CLASSIFIER: (str(FEATURES), "logits"),
    RESNET: (str(WIDTH), "logits"),
    INCEPTION: ("2048", "logits_unbiased"),
}
"""For each extractor: what FID and KID compare, and what the Inception Score reads."""
BATCH = {CLASSIFIER: 512, RESNET: 512, INCEPTION: 64}
DOWNLOAD_TIMEOUT_S = 30.0  # per connection and read; torch.hub waits for ever


class Unavailable(Exception):
    """There can be no quality figures; the message says why, and what to do."""


class Eyes(Protocol):
    """An extractor on a device, whoever made it.

    Attributes
    ----------
    shown
        The extractor's name in the results.
    sha256
        The hash of its weights.
    kept
        Whether the features of a reference set are kept on disk. They are not if it takes longer to
        make the extractor than to compute them, nor for a user's judge, whose code may change.
    """

    shown: str
    sha256: str
    kept: bool

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [n, d] and logits [n, classes] of uint8 [n, C, H, W], on the CPU."""
        ...

    @property
    def layer(self) -> str:
        """The name of the features."""
        ...


@dataclass(frozen=True)
class Extractor:
    """An extractor by its name, as a cache key: two of one kind and identity give equal features.

    Attributes
    ----------
    kind
        The extractor's name with torch-fidelity, a key of `LAYERS`, or `JUDGE`, or `OWN`.
    identity
        Where the weights come from.
    shown
        The extractor's name in the results.
    make
        A function that makes the extractor on a device; it raises `Unavailable` if it cannot.
    """

    kind: str
    identity: str
    shown: str
    make: Callable[[torch.device], Eyes] = field(compare=False, repr=False)


def extractor_of(config: EvaluationConfig, teacher: ImageSet, seed: int) -> Extractor:
    """Return the extractor that the settings of one judge (`choice.Choice`) name."""
    name, file = str(config.extractor), None if config.weights is None else str(config.weights)
    if name not in (INCEPTION_NAME, "classifier"):
        kind = JUDGE if name in PUBLIC else OWN
        return Extractor(kind, f"{name} {file}", name, lambda to: _Judged(config, to))
    if name == INCEPTION_NAME:
        weights = None if file is None else str(check_weights(file))

        def make_inception(device: torch.device) -> Eyes:
            return _Fidelity(INCEPTION, _inception(weights, device), device)

        # Inception is the same network at every seed
        return Extractor(INCEPTION, str(weights), INCEPTION, make_inception)
    if file is not None:
        network, header = load_features(file, tuple(teacher.images.shape[1:]))
        shown = f"classifier({header.dataset}, {WIDTH} features, sha256 {header.sha256[:12]})"
        return Extractor(
            RESNET, header.sha256, shown, lambda to: _wrapped(RESNET, shown, network.to(to), to)
        )
    shown = f"classifier({teacher.name or 'images'}, {FEATURES} features)"
    key = fingerprint(teacher)

    def make(device: torch.device) -> Eyes:
        missing = labels_missing(teacher)
        if missing is not None:
            raise Unavailable(f"evaluation.{missing}; use evaluation.extractor=inception")
        return _wrapped(CLASSIFIER, shown, trained_classifier(key, seed, device), device)

    return Extractor(CLASSIFIER, f"{key.fingerprint} {seed}", shown, make)


class _Fidelity:
    """One of torch-fidelity's extractors; see `Eyes`."""

    def __init__(
        self, shown: str, extractor: FeatureExtractorBase, device: torch.device, kept: bool = True
    ) -> None:
        self.shown, self.kept = shown, kept
        self.sha256 = weights_hash(getattr(extractor, "classifier", extractor))
        self.layer, self._classified = LAYERS[extractor.get_name()]
        self._extractor, self._device = extractor, device

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        kind = self._extractor.get_name()
        found: dict[str, Tensor] = get_featuresdict_from_dataset(
            _Images(images, grey_to_rgb=kind == INCEPTION),
            self._extractor,
            BATCH[kind],
            self._device.type == "cuda",
            save_cpu_ram=True,  # else it forks loader processes for images in memory
            verbose=False,
        )
        return found[self.layer], found[self._classified]


class _Judged:
    """A `Judge`, public or the user's; see `Eyes`. An error in it costs its figures, not the run.

    Raises
    ------
    Unavailable
    The judge cannot be made, or does not return what `Judge` says.
    """

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        self.layer = str(config.extractor)
        self.kept = self.layer in PUBLIC
        self._device = device
        with _unavailable():
            self._judge = made(config, device)
        name = self._judge.name
        self.shown = name if self.kept else f"{name} ({self.layer})"
        self.sha256 = self._judge.sha256

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with _unavailable(), blamed(KEY, self.layer):
            if not self.kept:  # a user's judge need not bear several threads
                return look(self._judge, images, self._device)
            with batches_at_once(self._device, usable_cores()) as pool:
                parts = images.split(SEEN_AT_ONCE)
                seen = pool.map(lambda some: look(self._judge, some, self._device), parts)
                features, logits = zip(*seen, strict=True)
            return torch.cat(features), torch.cat(logits)


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise Unavailable(str(error)) from error


def _wrapped(kind: str, shown: str, network: torch.nn.Module, device: torch.device) -> Eyes:
    """Wrap a classifier for torch-fidelity; one that is trained on the spot leaves no cache."""
    extractor = create_feature_extractor(
        kind, list(LAYERS[kind]), cuda=device.type == "cuda", verbose=False, classifier=network
    )
    return _Fidelity(shown, extractor, device, kept=kind != CLASSIFIER)


def _inception(weights: str | None, device: torch.device) -> FeatureExtractorBase:
    try:
        with socket_timeout(DOWNLOAD_TIMEOUT_S):
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
            "evaluation.weights=FILE to a copy, or evaluation.extractor to efficientnet_lite0 or "
            "classifier"
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
