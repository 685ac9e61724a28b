"""The header of a file of a trained classifier: all that can be known without loading the
network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fed_diffusion.config import ConfigError
from fed_diffusion.config.yaml import expanded

KEY = "fed-diffusion-features"


@dataclass(frozen=True)
class Header:
    """What a classifier was trained on and how well it does; the file holds this as JSON.

    Attributes
    ----------
    dataset, images
        The training images and their number.
    channels, size, classes
        What the network takes and tells apart.
    accuracy, held_out
        The accuracy on images that the classifier was not trained on, and which those are.
    epochs, seed
        The passes over the images and the seed of the training.
    sha256
        `features.weights_hash` of the weights.
    """

    dataset: str
    images: int
    channels: int
    size: int
    classes: int
    accuracy: float
    held_out: str
    epochs: int
    seed: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_header(weights: str | Path) -> Header:
    """Return the header of a file that `fed-diffusion features train` wrote.

    Raises
    ------
    ConfigError
    `evaluation.weights` does not exist, or is another kind of file.
    """
    path = expanded(weights, "evaluation.weights")
    how = "Make one with: fed-diffusion features train DATASET --out FILE."
    if not path.is_file():
        raise ConfigError(f"evaluation.weights = {str(weights)!r} does not exist. {how}")
    try:
        with safe_open(path, "pt") as file:
            return Header(**json.loads((file.metadata() or {})[KEY]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"evaluation.weights = {str(weights)!r} is not a file of a trained classifier "
            f"({type(error).__name__}: {error}). {how}"
        ) from error


def check_features(weights: str | Path, shape: tuple[int, ...]) -> Header:
    """Return `read_header`, or refuse a classifier of other images than [C, H, W] = shape."""
    header = read_header(weights)
    takes = (header.channels, header.size, header.size)
    if tuple(shape) != takes:
        raise ConfigError(
            f"evaluation.weights = {str(weights)!r} is a classifier of {header.dataset} for "
            f"[C, H, W] = {list(takes)}, and the run's images are {list(shape)}. Train one on "
            "images of that shape with fed-diffusion features train."
        )
    return header
