"""A run small enough for a test: real digits, a U-Net of a few thousand parameters."""

import pytest

from fed_diffusion.build import Setup
from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.protocol.wire import Wire

TINY = {
    "model.widths": [8, 16],
    "model.conditional": False,
    "diffusion.T": 4.13,
    "diffusion.delta": 1e-3,
    "evaluation.denoise": False,
    "rounds": 2,
    "clients": 5,
    "local.state": "fresh",
    "wire.state": "fp32",
    "local.eta": 1e-3,
    "local.steps": 3,
    "local.batch": 8,
    "diffusion.K": 20,
    "evaluation.samples": 0,
    "evaluation.steps": 10,
    "evaluation.every": 1,
    "evaluation.grid": 4,
    "theory.every": 0,
}


@pytest.fixture(scope="session")
def digits():
    return load_dataset(load_config("digits").data)


@pytest.fixture
def tiny():
    """tiny(**overrides with __ for dots) -> Config"""

    def make(**overrides):
        return load_config(
            "digits", TINY | {key.replace("__", "."): value for key, value in overrides.items()}
        )

    return make


def wire_of(config):
    """How the tensors of a run with this configuration travel."""
    family = Setup.of(config).family
    return Wire(config.wire, config.pruning, config.local, family, config.seed)


def planned(config, round, theta, layout=None):
    """The recipes of all clients of a run whose configuration says every keep ratio."""
    setup = Setup.of(config)
    keeps = setup.known_ratios()
    return plan_round(setup.family, config.pruning.kind, round, keeps, theta, layout)
