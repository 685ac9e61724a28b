"""Hessian products in parts: the same numbers, in a training step's memory."""

import weakref

import pytest
import torch

from fed_diffusion.build import Setup, build_network, parameters_of, skeleton
from fed_diffusion.client.budget import demand
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from fed_diffusion.theory.curvature import (
    ROOM,
    curvature,
    gradient,
    hessian_vector,
    images_at_once,
    images_within,
    saved_bytes,
)

SETTINGS = {
    "model.widths": [8, 16],
    "model.group": 8,
    "model.attention": [4],
    "model.head": 8,
    "local.batch": 16,
    "local.steps": 3,
    "local.state": "fresh",
}


class Kept:
    """The most bytes that autograd keeps at one time, beside the parameters."""

    def __init__(self, parameters):
        self.peak = self.now = 0
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._users = {}

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        class Box(list):
            pass

        storage = tensor.untyped_storage()
        key = storage._cdata
        size = 0 if key in self._own else storage.nbytes()
        if not self._users.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        box = Box([tensor])
        weakref.finalize(box, self._drop, key, size)
        return box

    def _drop(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= size


@pytest.fixture(scope="module")
def minibatch():
    """Parameters, the network as losses call it, and a minibatch of 16 images; past theta_0."""
    config = load_config("digits", SETTINGS)
    torch.manual_seed(0)
    theta = parameters_of(build_network(config))
    theta = {name: value + 0.05 * torch.randn_like(value) for name, value in theta.items()}
    worker = Worker(config, load_dataset(config.data))
    parameters, network, batches = worker.minibatches(theta, 0, 1, 1, 16)
    return parameters, network, next(batches)


def parts_of(batch, network, images):
    return [
        lambda part=part: part.loss(network) * (len(part) / len(batch))
        for part in batch.split(images)
    ]


@pytest.mark.parametrize("images", [1, 5, 16])
def test_the_products_of_the_parts_add_up_to_that_of_the_whole(minibatch, images):
    """At 5 images the last part is smaller: its weight is by its images."""
    parameters, network, batch = minibatch
    v = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(1))
    whole = hessian_vector(parameters, lambda: batch.loss(network))(v)
    parts = hessian_vector(parameters, parts_of(batch, network, images))(v)
    assert float((whole - parts).norm() / whole.norm()) < 1e-5


def test_the_parts_keep_the_times_that_were_drawn_for_the_whole(minibatch):
    _, network, batch = minibatch
    parts = batch.split(5)
    assert [len(part) for part in parts] == [5, 5, 5, 1]
    assert torch.equal(torch.cat([part.u for part in parts]), batch.u)
    total = sum(float(loss().detach()) for loss in parts_of(batch, network, 5))
    assert total == pytest.approx(float(batch.loss(network).detach()), rel=1e-6)


def test_a_curvature_takes_the_memory_of_a_training_step_and_not_several_times_that(minibatch):
    parameters, network, batch = minibatch
    with Kept(parameters) as step:
        gradient(parameters, batch.loss(network))
    with Kept(parameters) as measured:
        found = curvature(parameters, network, batch, 3, room=0)
    with Kept(parameters) as at_once:
        product = hessian_vector(parameters, lambda: batch.loss(network))
        product(torch.ones(sum(p.numel() for p in parameters)))
    assert at_once.peak > 3 * step.peak
    assert measured.peak < 1.2 * step.peak
    assert found.value > 0
    assert (step.now, measured.now) == (0, 0)


def test_as_many_images_go_at_once_as_the_step_has_room_for(minibatch):
    parameters, network, batch = minibatch
    images = images_at_once(parameters, network, batch, room=0)
    assert 1 <= images < len(batch)

    def kept(part, twice):
        with saved_bytes(parameters) as bytes_:
            gradient(parameters, part.loss(network), create_graph=twice)
        return bytes_()

    assert kept(batch[:images], True) < 1.2 * kept(batch, False)
    assert kept(batch[: images + 2], True) > kept(batch, False)
    assert images_at_once(parameters, network, batch[:1], room=0) == 1
    # a small network is not worth the time that small parts cost
    assert images_at_once(parameters, network, batch) == len(batch)
    assert images_within(step=5e8, product=1e8, images=256) == 5


def test_a_budget_counts_what_the_curvature_needs_beyond_a_step():
    """Of tiny networks the room that a product may take in any case, else a step's memory."""

    def needs(batch, every=None, measures=True, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        settings = SETTINGS | {"local.batch": batch, "theory.every": every} | changes
        config = load_config("digits", settings)
        return demand(Setup.of(config), skeleton(config), measures)

    plain, measuring = needs(4, measures=False), needs(4)
    assert measuring.activations > 2 * plain.activations
    assert measuring.parameters == pytest.approx(1.2 * plain.parameters)
    assert measuring.work == plain.work
    assert needs(4, every=0) == plain
    assert needs(4).activations == pytest.approx(4 * needs(1).activations, rel=0.01)
    wide = {"model__widths": [256, 512], "model__attention": []}  # a step takes more than the room
    step = needs(64, measures=False, **wide).activations
    assert step > ROOM
    assert needs(64, **wide).activations == pytest.approx(step, rel=1e-9)
    # what it counts is what the products keep
    config = load_config("digits", SETTINGS | {"local.batch": 4})
    worker = Worker(config, load_dataset(config.data))
    parameters, network, batches = worker.minibatches(
        parameters_of(build_network(config)), 0, 1, 1, 4
    )
    with Kept(parameters) as measured:
        curvature(parameters, network, next(batches), 1)
    assert measured.peak == pytest.approx(needs(4).activations, rel=0.3)
