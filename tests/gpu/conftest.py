"""For the tests of a GPU: pytest runs this folder alone there, with --confcutdir.

Nothing here may need Flower, Ray, hypothesis or a network. Without a GPU the device is the CPU, so
that no test of this folder can rot.
"""

from __future__ import annotations

import pytest
import torch

from fed_diffusion.config import Config, load_config
from fed_diffusion.data import ImageSet

CUDA = torch.cuda.is_available()
SMALL = {
    "data.name": "cifar10",
    "model.widths": [16, 32] if not CUDA else [64, 128, 128],
    "model.blocks": 1,
    "model.attention": [16],
    "model.conditional": True,
    "diffusion.K": 50,
    "clients": 4,
    "rounds": 2,
    "local.steps": 2,
    "local.batch": 4 if not CUDA else 64,
    "evaluation.samples": 0,
    "evaluation.reference": "none",
    "worker.precision": "fp32",
    "theory.every": 0,
}
"""The paper's CIFAR-10 settings at a size for the machine; images are noise, none is loaded."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def config():
    """config(**overrides with __ for dots) -> Config"""

    def make(**overrides) -> Config:
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_config("cifar10", SMALL | given)

    return make


@pytest.fixture(scope="session")
def images() -> ImageSet:
    draw = torch.Generator().manual_seed(0)
    shape = (400, 3, 32, 32)
    return ImageSet(
        torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        torch.randint(10, shape[:1], generator=draw),
    )
