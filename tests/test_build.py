"""A setup is what a configuration describes, made once."""

import math

import numpy as np
import pytest
import torch

from fed_diffusion.build import Setup, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import load_config
from fed_diffusion.data import partition
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import Sampler
from fed_diffusion.server.coordinator import Coordinator

OBJECTS = ("u", "loss", "skeleton", "shapes", "family", "layout", "device", "shape")


def test_what_a_setup_holds_is_made_once():
    setup = Setup.of(load_config("digits", {"pruning.kind": "channels", "pruning.keep": 0.5}))
    for name in OBJECTS:
        assert getattr(setup, name) is getattr(setup, name)
    assert Setup.of(setup) is setup
    assert setup.layout is not None


def test_the_numbers_of_a_setup_are_the_papers(tiny):
    setup = Setup.of(tiny(diffusion__K=3, diffusion__T=2.0, diffusion__delta=0.5))
    u = setup.u.tolist()
    assert (u[0], u[-1], len(u)) == (2.0, 0.5, 4)
    weights = [(u[k] - u[k + 1]) / (1 - math.exp(-2 * u[k])) for k in range(3)]
    assert pytest.approx(sum(weights)) == setup.Z
    assert setup.d == 64
    assert len(setup.sampling_times()) == 10 + 1  # evaluation.steps
    assert len(setup.sampling_times(7)) == 7 + 1


def test_images_are_split_once_and_the_split_is_the_partition_without_what_is_held_out(
    tiny, digits
):
    config = tiny(data__partition="dirichlet", data__holdout=0.2)
    setup = Setup.of(config)
    shares = setup.shares(digits)
    assert setup.shares(digits) is shares
    whole = partition(digits, config.data, config.clients, config.seed)
    for part, (train, held) in zip(whole, shares, strict=True):
        assert np.array_equal(np.sort(np.concatenate([train, held])), part)
        assert len(held) == math.floor(0.2 * len(part))
    fewer = digits.subset(np.arange(100))
    assert sum(len(part) for share in setup.shares(fewer) for part in share) == 100


def test_a_run_hands_one_setup_to_the_server_the_clients_and_the_sampler(tiny, digits, tmp_path):
    experiment = Experiment(tiny(), tmp_path / "run", digits)
    setup = experiment.setup
    experiment.close()
    worker = Worker(setup, digits)
    assert worker.images.shares is setup.shares(digits)
    assert worker.shapes is setup.shapes
    assert Coordinator(setup, setup.theta()).config is setup.config
    assert Sampler(setup, setup.theta()).setup is setup


def test_theta_0_is_new_each_time_and_the_same_bits(tiny):
    setup = Setup.of(tiny())
    one, two = setup.theta(), setup.theta()
    assert all(torch.equal(one[name], two[name]) for name in one)
    next(iter(one.values())).add_(1)
    assert not all(torch.equal(one[name], two[name]) for name in one)
    held = parameters_of(setup.network_with(one))
    assert all(torch.equal(held[name], one[name]) for name in one)
    assert held.keys() == setup.shapes.keys()
