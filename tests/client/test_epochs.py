"""local.epochs are passes over a client's images, however few they are; local.steps are as told."""

import math

import numpy as np
import psutil
import pytest
import torch

from fed_diffusion.analysis.measured import steps_taken
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, generator, torch_generator
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.masks.budget import BudgetError
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.protocol.wire import decode_update
from fed_diffusion.server.coordinator import Coordinator
from tests.tiny import wire_of


def epochs(tiny, count, batch, **overrides):
    return tiny(local__epochs=count, local__steps=None, local__batch=batch, **overrides)


def of_one_client(config, digits, images):
    """A worker whose only client has the first `images` digits, and its task of round 1."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits.subset(range(images)), own=True)
    return coordinator, worker, next(iter(coordinator.tasks(1)))


@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [
        (5, 128, [5]),
        (16, 128, [16]),
        (40, 128, [40]),
        (128, 128, [128]),
        (129, 128, [128, 1]),
        (300, 128, [128, 128, 44]),
    ],
)
def test_an_epoch_is_one_pass_over_a_clients_images(tiny, digits, images, batch, sizes):
    """The paper's 5 epochs at batch 128."""
    config = epochs(tiny, 5, batch, clients=1, data__holdout=0.0)
    _, worker, task = of_one_client(config, digits, images)
    steps = worker.steps(images)
    batches = worker.images.batches(task.round, task.client, np.arange(images), steps)
    assert steps == len(batches) == 5 * math.ceil(images / batch)
    assert [len(batch) for batch in batches] == 5 * sizes
    passes = np.concatenate(batches).reshape(5, images)
    assert (np.sort(passes) == np.arange(images)).all()
    assert len({tuple(order) for order in passes.tolist()}) == 5


def one_round(config, dataset):
    """The record of round 1, and the worker of all its clients."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, dataset)
    for task in coordinator.tasks(1):
        assert coordinator.receive(worker.run(task))
    return coordinator.close_round(), worker


def test_what_is_reported_is_what_was_trained_on(tiny, digits):
    few = digits.subset(range(100))
    config = epochs(tiny, 2, 8, data__partition="dirichlet", data__alpha=0.1, rounds=1)
    line, worker = one_round(config, few)
    counts = [len(worker.images.of(n).train) for n in range(5)]
    assert len(set(counts)) > 1
    assert [client.images for client in line.clients] == [2 * n for n in counts]
    assert line.images == 2 * sum(counts)


def test_a_pass_with_a_smaller_last_batch_is_equation_7_on_each_batchs_mean(tiny, digits):
    """13 images at batch 8, by a loop of its own; the loss is the mean over the images."""
    config = epochs(
        tiny, 2, 8, clients=1, data__holdout=0.0, local__optimizer="sgd", local__eta=0.05
    )
    coordinator, worker, task = of_one_client(config, digits, 13)
    update = worker.run(task)
    network, diffusion = build_network(config), config.diffusion
    loss = DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))
    noise = torch_generator(config.seed, Purpose.NOISE, 1, 0)
    draw = generator(config.seed, Purpose.BATCHES, 1, 0)
    total = 0.0
    for _ in range(2):
        order = draw.permutation(np.arange(13))
        for batch in (order[:8], order[8:]):
            network.zero_grad()
            value = loss(network, digits.images[batch].float() / 127.5 - 1, noise)
            value.backward()
            total += value.item() * len(batch)
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.grad is not None:
                        parameter -= eta_of(config.local, config.rounds, 1) * parameter.grad
    numbers = update.payload.numbers
    assert numbers["loss"] == pytest.approx(total / 26, rel=1e-5)
    assert (numbers["images"], numbers["examples"]) == (26, 13)
    end = decode_update(update.payload.arrays, coordinator.theta, {}, wire_of(config))
    for name, value in parameters_of(network).items():
        torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-6)


def test_steps_fill_every_batch_from_one_order_after_another(tiny, digits):
    config = tiny(local__steps=3, local__batch=8, clients=1, data__holdout=0.0)
    _, worker, task = of_one_client(config, digits, 5)
    batches = worker.images.batches(task.round, task.client, np.arange(5), 3)
    draw = generator(config.seed, Purpose.BATCHES, 1, 0)
    strung = np.concatenate([draw.permutation(np.arange(5)) for _ in range(5)])[:24]
    assert np.array_equal(batches, strung.reshape(3, 8))
    assert worker.run(task).payload.numbers["images"] == 24


def test_epochs_without_a_rest_are_as_many_steps_to_the_bit(tiny, digits):
    ends = []
    for config in (
        epochs(tiny, 3, 8, clients=1, data__holdout=0.0),
        tiny(local__steps=6, local__batch=8, clients=1, data__holdout=0.0),
    ):
        _, worker, task = of_one_client(config, digits, 16)
        ends.append(worker.run(task).payload)
    assert ends[0].arrays == ends[1].arrays
    assert ends[0].numbers["loss"] == ends[1].numbers["loss"]


def test_minibatches_that_are_measured_are_no_larger_than_those_of_training(tiny, digits):
    seen = []

    def sizes(config):
        _, worker, _ = of_one_client(config, digits, 5)
        seen.clear()
        batch = worker.images.batch
        worker.images.batch = lambda index, *random: (
            seen.append(len(index)),
            batch(index, *random),
        )[1]
        theta = parameters_of(build_network(config))
        _, network, drawn = worker.minibatches(theta, 0, 1, 2, 8)
        for minibatch in drawn:
            minibatch.loss(network)
        return list(seen)

    assert sizes(epochs(tiny, 1, 8, clients=1, data__holdout=0.0)) == [5, 5]
    assert sizes(tiny(local__batch=8, clients=1, data__holdout=0.0)) == [8, 8]


def test_a_budget_is_measured_at_the_batches_that_are_trained(tiny, digits):
    """A batch of 65,536 is no reason to refuse a client whose 40 images make one of 40."""
    settings = {
        "clients": 1,
        "model__widths": [16, 32],
        "model__group": 4,
        "pruning__kind": "channels",
        "pruning__ladder": [1, 0.5],
        "pruning__budget": "auto",
        "worker__memory_mb": psutil.Process().memory_info().rss / 1e6 + 500,
        "data__holdout": 0.0,
    }
    few = digits.subset(range(40))
    budget = Worker(epochs(tiny, 5, 2**16, **settings), few, own=True).budget()
    assert budget.keep == 1.0
    with pytest.raises(BudgetError, match="memory"):
        Worker(tiny(local__batch=2**16, **settings), few, own=True).budget()


def test_the_theorem_reads_the_steps_of_the_client_that_takes_most(tiny, digits):
    """27 images of each client at batch 8: 4 steps a pass, not 27 / 8."""
    config = epochs(tiny, 2, 8, rounds=1, theory__every=None)
    line, _ = one_round(config, digits.subset(range(150)))
    assert {client.images for client in line.clients} == {54}
    assert steps_taken(config.local, [line]) == {8}
