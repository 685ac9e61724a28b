"""Workers of unequal size: small networks, budgets, baselines, FedProx, the typed wire."""

import json
import re

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of, skeleton
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.config import ConfigError
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.engines.local import simulate
from fed_diffusion.masks.mask import mask_of
from fed_diffusion.protocol.codecs import Packed
from fed_diffusion.protocol.messages import Update
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.protocol.wire import Payload, decode_task, decode_update
from fed_diffusion.server.coordinator import Coordinator
from tests.masks.recipes import masks_of
from tests.tiny import wire_of

KEEP = [1, 1, 0.75, 0.5, 0.5]
SIZES = {"model__widths": [16, 32], "model__group": 4, "pruning__keep": KEEP}
KINDS = {
    "ordered": {"pruning__kind": "channels"},
    "rolling": {"pruning__kind": "channels", "pruning__choice": "rolling"},
    "random": {"pruning__kind": "channels", "pruning__choice": "random"},
    "magnitude": {"pruning__kind": "channels", "pruning__choice": "magnitude"},
    "balanced": {"pruning__kind": "balanced", "pruning__unit": "channels"},
}
QUANT = {"wire__down": "int8", "wire__up": "int8", "wire__differences": True}


def start(config, digits):
    return Coordinator(config, parameters_of(build_network(config))), Worker(config, digits)


def play(coordinator, worker, rounds):
    for round in range(coordinator.round + 1, coordinator.round + rounds + 1):
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task)), coordinator.open.rejected
        summary = coordinator.close_round()
    return summary


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_holds_and_trains_only_the_small_network(tiny, digits, kind):
    config = tiny(**SIZES, **KINDS[kind])
    coordinator, worker = start(config, digits)
    weak = list(coordinator.tasks(1))[-1]
    coordinator.receive(worker.run(weak))
    (network,) = worker.networks.all()
    held = sum(p.numel() for p in network.parameters())
    assert held <= 0.5 * coordinator.parameters
    assert sum(p.numel() for p in worker.setup.skeleton.parameters() if not p.is_meta) == 0
    (line,) = coordinator.open.clients
    assert line.keep == pytest.approx(held / coordinator.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_on_small_networks_is_the_round_of_masked_whole_ones(tiny, digits, kind):
    """An independent loop: whole networks, masked gradients of (7), the mean of (8) by counting."""
    config = tiny(
        local__optimizer="sgd", local__eta=0.05, data__holdout=0.0, **SIZES, **KINDS[kind]
    )
    coordinator, worker = start(config, digits)
    play(coordinator, worker, 1)  # past the zero-initialised layers
    theta = {name: value.clone() for name, value in coordinator.theta.items()}
    sums = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in theta.items()}
    counts = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in theta.items()}
    diffusion = config.diffusion
    loss = DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))
    for task in coordinator.tasks(2):
        masks = masks_of(coordinator.open.recipes[task.client], theta, coordinator.layout)
        masks = {n: mask_of(masks, n, v).dense() for n, v in theta.items()}
        network = build_network(config)
        named = dict(network.named_parameters())
        for name, parameter in named.items():
            parameter.data.copy_(theta[name] * masks[name])
        noise = torch_generator(config.seed, Purpose.NOISE, 2, task.client)
        for batch in worker.images.batches(2, task.client, worker.images.of(task.client).train, 3):
            images = digits.images[torch.from_numpy(batch)].float() / 127.5 - 1
            network.zero_grad()
            loss(network, images, noise).backward()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    parameter.data -= (
                        eta_of(config.local, config.rounds, 2) * parameter.grad * masks[name]
                    )
        for name, parameter in named.items():
            sums[name] += parameter.detach().double() * masks[name]
            counts[name] += masks[name]
        assert coordinator.receive(worker.run(task))
    coordinator.close_round()
    for name, value in coordinator.theta.items():
        expected = torch.where(counts[name] > 0, sums[name] / counts[name], theta[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_clients_changes_no_bit(tiny, digits, kind):
    config = tiny(**SIZES, **KINDS[kind], **QUANT)
    first, worker = start(config, digits)
    play(first, worker, 2)
    second, fresh = start(config, digits)
    for round in (1, 2):
        for task in reversed(list(second.tasks(round))):
            assert second.receive(fresh.run(task))
        second.close_round()
    assert all(torch.equal(first.theta[name], second.theta[name]) for name in first.theta)


@pytest.mark.parametrize("kind", ["channels", "random", "topk", "balanced"])
def test_differences_come_back_as_what_training_made_of_theta(tiny, digits, kind):
    plain = tiny(**SIZES, pruning__kind=kind)
    typed = tiny(**SIZES, pruning__kind=kind, wire__differences=True)
    thetas = []
    for config in (plain, typed):
        coordinator, worker = start(config, digits)
        play(coordinator, worker, 1)
        thetas.append(coordinator.theta)
    for name, value in thetas[0].items():
        torch.testing.assert_close(thetas[1][name], value, rtol=1e-5, atol=1e-6)


def test_rounding_on_the_way_down_does_not_stay_in_theta(tiny, digits):
    """int8 both ways, and workers that change nothing: theta stays theta_0, to its fixed point."""
    config = tiny(local__eta=1e-30, local__optimizer="sgd", **QUANT)
    coordinator, worker = start(config, digits)
    before = {name: value.clone() for name, value in coordinator.theta.items()}
    play(coordinator, worker, 2)
    for name, value in before.items():
        assert float((coordinator.theta[name] - value).abs().max()) <= 2**-40


def test_int8_both_ways_costs_a_quarter(tiny, digits):
    """Of a network whose tensors are not tiny: a scale is four bytes for a channel of hundreds."""
    coordinator, worker = start(tiny(model__widths=[32, 64], **QUANT), digits)
    summary = play(coordinator, worker, 1)
    for direction in (summary.bytes_down, summary.bytes_up):
        assert direction < 0.26 * summary.dense_bytes


def test_the_ledger_is_what_the_messages_hold(tiny, digits):
    coordinator, worker = start(tiny(**SIZES, **KINDS["magnitude"], **QUANT), digits)
    down = up = 0
    for task in coordinator.tasks(1):
        update = worker.run(task)
        for part, total in ((task.payload, "down"), (update.payload, "up")):
            size = sum(len(array.data) for array in part.arrays.values())
            for value in part.numbers.values():
                each = 8 * len(value) if isinstance(value, list) else 8
                size += len(value) if isinstance(value, str) else each
            size += sum(len(key) for key in part.numbers)
            down, up = (down + size, up) if total == "down" else (down, up + size)
        coordinator.receive(update)
    summary = coordinator.close_round()
    assert (summary.bytes_down, summary.bytes_up) == (down, up)
    assert sum(client.bytes_up for client in summary.clients) == up


def test_the_proximal_term_pulls_towards_where_the_round_began(tiny, digits):
    def moved(mu):
        coordinator, worker = start(tiny(local__prox=mu, local__steps=8, local__eta=0.01), digits)
        before = {name: value.clone() for name, value in coordinator.theta.items()}
        play(coordinator, worker, 1)
        return sum(float((coordinator.theta[n] - before[n]).norm()) ** 2 for n in before) ** 0.5

    assert moved(100.0) < 0.9 * moved(0.0)


def test_the_proximal_gradient_is_mu_times_the_way_from_the_start(tiny, digits):
    """One step of SGD changes nothing (the way is 0), the second one by eta mu times the first."""
    ends = {}
    for mu in (0.0, 10.0):
        for steps in (1, 2):
            config = tiny(
                local__prox=mu, local__steps=steps, local__eta=0.01, local__optimizer="sgd"
            )
            coordinator, worker = start(config, digits)
            task = next(iter(coordinator.tasks(1)))
            update = worker.run(task)
            ends[mu, steps] = decode_update(
                update.payload.arrays, coordinator.theta, {}, wire_of(config)
            )
            before = coordinator.theta
    for name, value in before.items():
        assert torch.equal(ends[0.0, 1][name], ends[10.0, 1][name])
        way = ends[0.0, 1][name] - value
        torch.testing.assert_close(
            ends[10.0, 2][name], ends[0.0, 2][name] - 0.01 * 10.0 * way, rtol=1e-5, atol=1e-7
        )


def test_exclusive_trains_only_the_workers_with_the_whole_network(tiny, digits):
    coordinator, worker = start(
        tiny(pruning__kind="random", pruning__keep=KEEP, pruning__baseline="exclusive"), digits
    )
    summary = play(coordinator, worker, 1)
    assert [client.client for client in summary.clients] == [0, 1]
    assert summary.gamma == 2


def test_small_trains_the_smallest_workers_network_with_everyone(tiny, digits):
    small = tiny(**SIZES, pruning__kind="random", pruning__baseline="small")
    whole = tiny(**SIZES, pruning__kind="channels")
    coordinator, worker = start(small, digits)
    largest = sum(p.numel() for p in skeleton(whole).parameters())
    assert 0.4 * largest < coordinator.parameters <= 0.5 * largest
    summary = play(coordinator, worker, 1)
    assert (len(summary.clients), summary.gamma, summary.w2_max) == (5, 5, 0.0)
    fresh = build_network(small)
    assert all((p == 0).all() for p in fresh.leave.parameters())  # it starts as a U-Net starts


BAD = {
    "a group the model lacks": (
        lambda n, a: (n | {"recipe.groups": [99, *n["recipe.groups"][1:]]}, a),
        "not the one agreed on: groups",
    ),
    "another ratio": (lambda n, a: (n | {"recipe.keep": 0.25}, a), "agreed on: keep"),
    "a choice that is none": (lambda n, a: (n | {"recipe.choice": 9}, a), "agreed on: choice 9"),
    "the whole tensor": (
        lambda n, a: (n, a | {"enter.weight": Packed("int8", (16, 1, 3, 3), bytes(64 + 144))}),
        "enter.weight is sent with shape",
    ),
    "too few bytes": (
        lambda n, a: (n, a | {"enter.bias": Packed("int8", a["enter.bias"].shape, b"")}),
        "enter.bias is sent with shape .* and 0 bytes",
    ),
    "another type": (
        lambda n, a: (n, a | {"enter.bias": Packed("float32", (8,), bytes(32))}),
        "enter.bias is sent as 'float32', not int8",
    ),
    "another name": (lambda n, a: (n, a | {"exit.bias": a["enter.bias"]}), "names differ"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_costs_its_own_client_and_nothing_else(tiny, digits, case):
    change, message = BAD[case]
    coordinator, worker = start(tiny(**SIZES, **KINDS["magnitude"], **QUANT), digits)
    for task in coordinator.tasks(1):
        update = worker.run(task)
        if task.client == 4:
            numbers, arrays = change(dict(update.payload.numbers), dict(update.payload.arrays))
            update = Update(1, 4, Payload(arrays, numbers))
        assert coordinator.receive(update) == (task.client != 4)
    summary = coordinator.close_round()
    assert [client.client for client in summary.clients] == [0, 1, 2, 3]
    (rejected,) = summary.rejected
    assert rejected["client"] == 4

    assert re.search(message, rejected["reason"]), rejected["reason"]


def test_a_worker_refuses_a_task_whose_groups_its_model_lacks(tiny, digits):
    config = tiny(**SIZES, **KINDS["magnitude"])
    coordinator, worker = start(config, digits)
    task = list(coordinator.tasks(1))[-1]
    numbers = task.payload.numbers | {"recipe.groups": [99] * 40}
    with pytest.raises(ValueError, match="groups"):
        decode_task(
            Payload(task.payload.arrays, numbers), worker.shapes, worker.layout, wire_of(config)
        )


def test_budgets_that_a_machine_measures_hold_for_all_its_clients(tiny, tmp_path):
    config = tiny(
        model__widths=[16, 32],
        model__group=4,
        pruning__kind="channels",
        pruning__budget="auto",
        pruning__ladder=[1, 0.5, 0.25],
    )
    simulate(config, tmp_path / "run", processes=1)
    budgets = json.loads((tmp_path / "run" / "budgets.json").read_text())
    assert set(budgets) == {"0", "1", "2", "3", "4"}
    assert all(budget["keep"] == 1.0 and budget["budget.limit"] == 0 for budget in budgets.values())


def test_a_deadline_that_only_small_networks_meet_gives_small_networks(tiny, digits):
    from fed_diffusion.masks.budget import TRAINING_SHARE

    def config(deadline):
        return tiny(
            model__widths=[32, 64],
            pruning__kind="channels",
            pruning__budget="auto",
            pruning__ladder=[1, 0.5, 0.35],
            round__deadline_s=deadline,
        )

    budget = Worker(config(1e6), digits).budget()
    assert budget.keep == 1.0
    tight = Worker(config(1e-6), digits)
    with pytest.raises(RuntimeError, match=r"not even keep = 0\.35"):
        tight.budget()
    assert budget.seconds_cap == TRAINING_SHARE * 1e6


def test_nodes_that_say_their_ratio_need_nodes(tiny, tmp_path):
    config = tiny(pruning__kind="topk", pruning__budget="node")
    with pytest.raises(ConfigError, match=r"give pruning\.keep one ratio per client"):
        simulate(config, tmp_path / "run", processes=1)


def test_the_bounds_factor_is_written_down(tiny, digits):
    coordinator, worker = start(tiny(**SIZES, **KINDS["ordered"]), digits)
    summary = play(coordinator, worker, 1)
    assert summary.w2_n_over_gamma == pytest.approx(summary.w2_max * 5 / summary.gamma)
    json.dumps(summary.to_dict(), allow_nan=False)
