"""A small classifier as a feature extractor for FID, KID and the Inception Score.

The Inception network was trained on photographs and has to be downloaded; for 8x8 digits a small
network trained on the labelled reference set tells more, and needs nothing but the data. Figures
made with it compare only with figures made with the same reference set and seed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.rng import Purpose, seed_torch, torch_generator
from fed_diffusion.config import ConfigError
from fed_diffusion.data.datasets import ImageSet, content_hash, to_unit
from fed_diffusion.store.start import hash_of

CLASSIFIER = "fed-diffusion-classifier"
"""The name under which torch-fidelity knows `ClassifierFeatures`."""
FEATURES = 64
BATCH = 64
LEARNING_RATE = 5e-3
EPOCHS = 8
FEWEST_STEPS = 200
SMALL = 16
"""The side in pixels up to which a training step is too little work for several threads."""


class FeatureNet(nn.Module):
    """A classifier whose last layer sees the spatial means of `layers`, [n, features]."""

    layers: nn.Sequential
    logits: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Return features [n, features] of floats [n, C, H, W] in [-1, 1]."""
        # a mean, not adaptive_avg_pool2d: that one's gradient is not deterministic on CUDA
        out: Tensor = self.layers(x).mean(dim=(2, 3))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of floats [n, C, H, W] in [-1, 1]."""
        out: Tensor = self.logits(self.features(x))
        return out


class Classifier(FeatureNet):
    """A convolutional classifier whose last layer sees `FEATURES` spatial means.

    Every convolution but the first halves the side, until 2 pixels or fewer are left, so that the
    features see the whole image at any size.

    Parameters
    ----------
    channels : 1 or 3
    size : side of the images it is meant for, in pixels
    classes : number of logits
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [*convolution(channels, FEATURES // 2, stride=1)]
        width, side = FEATURES // 2, size
        while width < FEATURES or side > 2:
            layers += convolution(width, FEATURES, stride=2)
            width, side = FEATURES, math.ceil(side / 2)
        self.layers = nn.Sequential(*layers)
        self.logits = nn.Linear(FEATURES, classes)


def convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


def labels_missing(reference: ImageSet) -> str | None:
    """Return why no classifier can be trained on `reference`; None if one can."""
    if reference.labels is None:
        return f"extractor = classifier needs labels, and {reference.name} has none"
    if len(reference.labels) == 0 or bool((reference.labels == reference.labels[0]).all()):
        return f"extractor = classifier needs two classes or more, and {reference.name} has fewer"
    return None


def train_classifier(
    reference: ImageSet,
    seed: int,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a `Classifier` on labelled images; the same seed, device and threads give the same one.

    Parameters
    ----------
    reference : images uint8 [n, C, H, W] with labels int64 [n]
    seed : start values and order of the batches come from it
    epochs : passes over the images; default 8, or as many as `FEWEST_STEPS` steps take
    device : where it is trained and stays

    Raises
    ------
    ConfigError
        The images have no labels, or only one class.
    """
    missing = labels_missing(reference)
    if missing is not None or reference.labels is None:
        raise ConfigError(f"evaluation.{missing}. Use evaluation.extractor=inception.")
    n, channels, size, _ = reference.images.shape
    epochs = epochs or max(EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(n / BATCH)))
    classes = int(reference.labels.max()) + 1
    network = seeded(lambda: Classifier(channels, size, classes), seed).to(device)
    order = torch_generator(seed, Purpose.EVALUATION, client=1)
    fit(network, reference, order, epochs)
    return network


Net = TypeVar("Net", bound=FeatureNet)


def seeded(make: Callable[[], Net], seed: int) -> Net:
    """Return what `make` makes, with start values from the seed."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed, Purpose.EVALUATION, cuda=False)
        return make()


def fit(
    network: FeatureNet,
    reference: ImageSet,
    order: torch.Generator,
    epochs: int,
    batch: int = BATCH,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train a classifier with Adam on one cycle of step sizes, then freeze it.

    Parameters
    ----------
    reference : with labels
    order : the order of the images comes from it
    augment : from uint8 [n, C, H, W] to the same
    """
    assert reference.labels is not None
    n, size = len(reference), reference.images.shape[-1]
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * math.ceil(n / batch) + 1
    )
    network.train()
    with torch.enable_grad(), reproducible(), _threads_worth(size):
        for _ in range(epochs):
            for chosen in torch.randperm(n, generator=order).split(batch):
                if len(chosen) > 1:  # a single image has no batch statistics
                    images = reference.images[chosen]
                    images = images if augment is None else augment(images)
                    _step(network, optimizer, images, reference.labels[chosen])
                schedule.step()
    network.requires_grad_(False).eval()


def _step(network: FeatureNet, optimizer: Any, images: Tensor, labels: Tensor) -> None:
    device = network.logits.weight.device
    optimizer.zero_grad()
    F.cross_entropy(network(to_unit(images.to(device))), labels.to(device)).backward()
    optimizer.step()


@contextlib.contextmanager
def _threads_worth(size: int) -> Iterator[None]:
    """Return one CPU thread for small images; more gain little, and lose tenfold on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size <= SMALL else min(before, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reproducible() -> Any:
    """Return a context in which cuDNN uses deterministic full-precision kernels."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


@dataclass(frozen=True)
class Fingerprinted:
    """A reference set as a cache key: two sets of the same content are equal.

    A sweep loads the same data for each run; what depends on the content alone is then computed
    once per process.
    """

    fingerprint: str
    reference: ImageSet = field(compare=False, repr=False)


def fingerprint(reference: ImageSet) -> Fingerprinted:
    """Return the key of a reference set: the hash of its content."""
    return Fingerprinted(content_hash(reference), reference)


def weights_hash(network: nn.Module) -> str:
    """Return SHA-256 over names, types, shapes and bytes of the weights, not of their file."""
    return hash_of(network.state_dict())


def trained_classifier(
    key: Fingerprinted, seed: int, device: torch.device | str = "cpu"
) -> Classifier:
    """Call `train_classifier`, and remember the result for the process."""
    return _trained(key, seed, str(device))


@lru_cache(maxsize=2)
def _trained(key: Fingerprinted, seed: int, device: str) -> Classifier:
    return train_classifier(key.reference, seed, device=device)


class ClassifierFeatures(FeatureExtractorBase):
    """A `Classifier` as torch-fidelity takes it: FID, KID and PRC see 64 features, ISC the logits.

    torch-fidelity makes extractors itself, from a name and its keyword arguments; the trained
    network is one of them:
    `calculate_metrics(feature_extractor=CLASSIFIER, classifier=network, ...)`.
    """

    def __init__(
        self, name: str, features_list: list[str], classifier: FeatureNet, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features of uint8 [n, C, H, W], in the order they were asked for.

        Raises
        ------
        TypeError
            Anything but a uint8 tensor of four dimensions: a float image's range is anybody's
            guess, and a wrong guess gives a plausible, wrong figure.
        """
        require_images(images)
        features = self.classifier.features(to_unit(images))
        provided = {str(features.shape[1]): features, "logits": self.classifier.logits(features)}
        return tuple(provided[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False  # the first compilation takes longer than the whole evaluation

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError("the classifier is not compiled")


def require_images(images: object) -> None:
    """Refuse whatever is not a uint8 tensor [n, C, H, W] with one or three channels.

    Raises
    ------
    TypeError
    The message says what was given and what to do.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images are a uint8 tensor [n, C, H, W], not a {type(images).__name__}")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise TypeError(
            f"images are a uint8 tensor [n, 1 or 3, H, W], not {images.dtype} "
            f"{list(images.shape)}; turn floats in [-1, 1] into uint8 with data.datasets.to_uint8"
        )


register_feature_extractor(CLASSIFIER, ClassifierFeatures)
