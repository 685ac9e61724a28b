"""Adam's moments that outlive the round (local.state: shared), on the worker's side."""

import torch

from fed_diffusion.build import Setup, build_network, parameters_of, skeleton
from fed_diffusion.client.budget import demand
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, generator, seed_torch, torch_generator
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.protocol.moments import FIRST, SECOND, STEPS
from fed_diffusion.server.coordinator import Coordinator

SHARED = {"local__state": "shared"}


def play(config, digits):
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    for round in range(1, config.rounds + 1):
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task)), coordinator.open.rejected
        coordinator.close_round()
    return coordinator


def test_one_client_over_rounds_is_one_run_of_adam_bit_for_bit(tiny, digits):
    """An independent loop with one torch.optim.Adam over all R S steps."""
    config = tiny(**SHARED, clients=1, rounds=4, local__steps=3, local__schedule="constant")
    coordinator = play(config, digits)
    network = build_network(config).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=config.local.eta, fused=True)
    diffusion = config.diffusion
    loss = DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))
    train = Worker(config, digits).images.of(0).train
    for round in range(1, 5):
        seed_torch(config.seed, Purpose.DROPOUT, round, 0)
        noise = torch_generator(config.seed, Purpose.NOISE, round, 0)
        order = generator(config.seed, Purpose.BATCHES, round, 0).permutation(train)
        for batch in order[: 3 * config.local.batch].reshape(3, -1):
            images = digits.images[torch.from_numpy(batch)].float() / 127.5 - 1
            optimiser.zero_grad()
            loss(network, images, noise).backward()
            optimiser.step()
    for name, parameter in network.named_parameters():
        state = optimiser.state[parameter]
        assert torch.equal(coordinator.theta[name], parameter), name
        assert torch.equal(coordinator.moments[FIRST + name], state["exp_avg"]), name
        assert torch.equal(coordinator.moments[SECOND + name], state["exp_avg_sq"]), name
        assert bool((coordinator.moments[STEPS + name] == 12).all()), name


def test_a_budget_counts_the_moments_that_come_with_a_task(tiny):
    network = skeleton(tiny())
    parameters = sum(p.numel() for p in network.parameters())
    fresh, shared = (demand(Setup.of(c), network) for c in (tiny(), tiny(**SHARED)))
    assert shared.parameters - fresh.parameters == 8 * parameters
    assert shared.activations == fresh.activations
