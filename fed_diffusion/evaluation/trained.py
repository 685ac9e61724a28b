"""A classifier that is trained once on a labelled data set, and kept in a file as an extractor.

Its figures compare only with figures of the same file, known by its hash.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor

from fed_diffusion.common.rng import Purpose, generator, torch_generator
from fed_diffusion.config import ConfigError
from fed_diffusion.config.schema import DataConfig
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data.datasets import ImageSet, has_test_split, load_dataset, tell, to_unit
from fed_diffusion.evaluation.features import (
    ClassifierFeatures,
    FeatureNet,
    convolution,
    fit,
    labels_missing,
    seeded,
    weights_hash,
)
from fed_diffusion.evaluation.weights import KEY, Header, check_features
from fed_diffusion.store.files import save_tensors

RESNET = "fed-diffusion-resnet"
"""The name under which torch-fidelity knows `ResNetFeatures`."""
WIDTH = 96
BATCH = 128
HELD_OUT = 0.1
_STREAM = 20  # the first of EVALUATION's streams that is free


class ResNet(FeatureNet):
    """A classifier of residual blocks, 24 to 96 channels, that halve the side until 4 pixels are
    left.

    At 32x32 it has three blocks, 339,010 parameters and 96 features.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        width, side = WIDTH // 4, size
        layers: list[nn.Module] = [*convolution(channels, width, stride=1)]
        while width < WIDTH or side > 4:
            layers.append(_Residual(width, min(2 * width, WIDTH)))
            width, side = min(2 * width, WIDTH), math.ceil(side / 2)
        self.layers = nn.Sequential(*layers)
        self.logits = nn.Linear(WIDTH, classes)


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *convolution(width, out, stride=2),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Conv2d(width, out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


class ResNetFeatures(ClassifierFeatures):
    """A `ResNet` as torch-fidelity takes it."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return str(WIDTH), "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(WIDTH)


register_feature_extractor(RESNET, ResNetFeatures)


def train_features(
    data: DataConfig, epochs: int, seed: int, device: torch.device
) -> tuple[ResNet, Header]:
    """Train a `ResNet` on the labels of a set; images are shifted, and mirrored with data.flip.

    Raises
    ------
    ConfigError
    The set cannot be loaded, or has fewer than two classes.
    """
    train, test, held_out = _split(data, seed)
    missing = labels_missing(train)
    if missing is not None or train.labels is None:
        raise ConfigError(f"features train: {missing}.")
    channels, size = train.images.shape[1:3]
    classes = int(train.labels.max()) + 1
    network = seeded(lambda: ResNet(channels, size, classes), seed).to(device)
    network.to(memory_format=torch.channels_last)
    order = torch_generator(seed, Purpose.EVALUATION, client=_STREAM)

    def augment(images: Tensor) -> Tensor:
        return shifted(images, size // 8, data.flip, order)

    fit(network, train, order, epochs, BATCH, augment)
    network.cpu().to(memory_format=torch.contiguous_format)
    header = Header(
        dataset=data.name,
        images=len(train),
        channels=channels,
        size=size,
        classes=classes,
        accuracy=_accuracy(network, test),
        held_out=held_out,
        epochs=epochs,
        seed=seed,
        sha256=weights_hash(network),
    )
    return network, header


def _split(data: DataConfig, seed: int) -> tuple[ImageSet, ImageSet, str]:
    """Return what is trained on, what is held out, and the name of the held-out part."""
    dataset = tell(load_dataset(data))
    if has_test_split(data):
        test = load_dataset(data, "test")
        return dataset, test, f"test split ({len(test)} images)"
    order = generator(seed, Purpose.EVALUATION, client=_STREAM + 1).permutation(len(dataset))
    held = max(1, math.floor(HELD_OUT * len(dataset)))
    return dataset.subset(order[held:]), dataset.subset(order[:held]), f"{held} images set aside"


def shifted(images: Tensor, most: int, flip: bool, draw: torch.Generator) -> Tensor:
    """Return each image [C, H, W] moved by up to `most` pixels either way, and mirrored at
    random.
    """
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1), generator=draw)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    if flip:
        mirrored = torch.rand(n, 1, generator=draw) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (most,) * 4)
    # the indices around the slice come first: [n, H, W, C]
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _accuracy(network: ResNet, test: ImageSet) -> float:
    assert test.labels is not None
    hits = 0
    for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
        hits += int((network(to_unit(images)).argmax(1) == labels).sum())
    return hits / len(test)


def save_features(path: Path, network: ResNet, header: Header) -> None:
    """Write the network with its header, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_tensors(unfinished, network.state_dict(), {KEY: json.dumps(header.to_dict())})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_features(weights: str, shape: tuple[int, ...]) -> tuple[ResNet, Header]:
    """Return the network in a file and its header, for images of [C, H, W] = shape.

    Raises
    ------
    ConfigError
    The file is missing, damaged, or for images of another shape.
    """
    header = check_features(weights, shape)
    network = ResNet(header.channels, header.size, header.classes)
    try:
        network.load_state_dict(load_file(expanded(weights, "evaluation.weights")))
        whole = weights_hash(network) == header.sha256
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"evaluation.weights = {weights!r} does not fit ({error}).") from error
    if not whole:
        raise ConfigError(
            f"evaluation.weights = {weights!r} is damaged: its content does not have "
            "the hash in its header."
        )
    return network.requires_grad_(False).eval(), header
