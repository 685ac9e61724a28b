"""What a worker does to a step's gradient before its optimiser sees it."""

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.server.coordinator import Coordinator

ONE = {"clients": 1, "rounds": 1, "local__optimizer": "sgd", "local__eta": 0.5}


def trained(config, digits):
    start = parameters_of(build_network(config))
    coordinator = Coordinator(config, start)
    worker = Worker(config, digits)
    for task in coordinator.tasks(1):
        assert coordinator.receive(worker.run(task)), coordinator.open.rejected
    coordinator.close_round()
    difference = {name: coordinator.theta[name] - value for name, value in start.items()}
    return coordinator.theta, torch.cat([d.flatten() for d in difference.values()]).double().norm()


@pytest.mark.parametrize("masks", [{}, {"pruning__kind": "random", "pruning__level": "S"}])
def test_a_step_goes_no_further_than_eta_times_the_largest_norm(tiny, digits, masks):
    own = ONE | masks | {"local__steps": 1}
    _, free = trained(tiny(**own), digits)
    most = float(free) / 0.5 / 4  # a quarter of the gradient's norm
    _, bounded = trained(tiny(**own, local__max_grad_norm=most), digits)
    assert float(bounded) == pytest.approx(0.5 * most, rel=1e-4)


def test_a_largest_norm_that_no_gradient_reaches_changes_no_bit(tiny, digits):
    theta, _ = trained(tiny(**ONE), digits)
    same, _ = trained(tiny(**ONE, local__max_grad_norm=1e9), digits)
    assert all(torch.equal(theta[name], same[name]) for name in theta)


def test_adamw_without_a_decay_is_adam_bit_for_bit_and_decays_a_hundredth_by_default(tiny, digits):
    adam = ONE | {"local__optimizer": "adam"}
    theta, _ = trained(tiny(**adam), digits)
    adamw = ONE | {"local__optimizer": "adamw"}
    same, _ = trained(tiny(**adamw, local__weight_decay=0), digits)
    assert all(torch.equal(theta[name], same[name]) for name in theta)
    assert tiny(**adamw).local.decay == 0.01
    assert tiny(**adam).local.decay == 0


def test_adam_refuses_a_decay_and_names_adamw(tiny):
    with pytest.raises(ValueError, match=r"set local\.optimizer to adamw"):
        tiny(local__optimizer="adam", local__weight_decay=0.1)
