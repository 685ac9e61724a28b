"""Both sides of a round: equations (7) and (8) on real digits."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fed_diffusion.build import Setup, build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.common.rng import Purpose, torch_generator
from fed_diffusion.diffusion.loss import DSMLoss
from fed_diffusion.diffusion.partitions import PARTITIONS
from fed_diffusion.masks.mask import mask_of
from fed_diffusion.protocol.schedules import eta_of
from fed_diffusion.protocol.wire import Packed, Payload, decode_task, decode_update
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.server.participation import Participation
from tests.masks.recipes import masks_of
from tests.tiny import planned, wire_of


def start(config, digits):
    return Coordinator(config, parameters_of(build_network(config))), Worker(config, digits)


def play(coordinator, worker, rounds):
    for round in range(1, rounds + 1):
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task))
        summary = coordinator.close_round()
    return summary


def only_network(worker):
    (network,) = worker.networks.all()
    return network


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["R-FedDM-S", "T-FedDM-M"])
@pytest.mark.parametrize("scope", ["weights", "all"])
def test_masked_coordinates_stay_exactly_zero(tiny, digits, optimizer, method, scope):
    config = tiny(local__optimizer=optimizer, method=method, pruning__scope=scope)
    coordinator, worker = start(config, digits)
    play(coordinator, worker, 1)  # past the zero-initialised layers
    tasks = {task.client: task for task in coordinator.tasks(2)}
    worker.run(tasks[4])
    recipes = planned(config, 2, coordinator.theta)
    found = masks_of(recipes[4], coordinator.theta)
    masks = {name: mask.dense() for name, mask in found.items()}
    trained = parameters_of(only_network(worker))
    assert sum(int((~mask).sum()) for mask in masks.values()) > 0
    moved = 0
    for name, mask in masks.items():
        assert (trained[name][~mask] == 0).all()
        moved += int((trained[name][mask] != coordinator.theta[name][mask]).sum())
    assert moved > 0


def test_sgd_is_equation_7_to_the_letter(tiny, digits):
    """S masked steps against a loop of its own with autograd's gradients."""
    config = tiny(local__optimizer="sgd", method="R-FedDM-S", local__eta=0.05, data__holdout=0.0)
    coordinator, worker = start(config, digits)
    tasks = {task.client: task for task in coordinator.tasks(1)}
    task = tasks[3]
    _, masks, theta = decode_task(task.payload, coordinator.theta, None, wire_of(config))
    network = build_network(config)
    noise = torch_generator(config.seed, Purpose.NOISE, 1, 3)
    batches = worker.images.batches(1, 3, worker.images.of(3).train, 3)
    diffusion = config.diffusion
    loss = DSMLoss(PARTITIONS[diffusion.partition](diffusion.T, diffusion.delta, diffusion.K))
    for batch in batches:
        for name, parameter in network.named_parameters():
            parameter.data.copy_(theta[name])
        images = digits.images[torch.from_numpy(batch)].float() / 127.5 - 1
        gradients = torch.autograd.grad(
            loss(network, images, noise), list(network.parameters()), allow_unused=True
        )
        for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
            mask = mask_of(masks, name, theta[name]).dense()
            theta[name] = theta[name] - eta_of(config.local, config.rounds, 1) * gradient * mask
    worker.run(task)
    for name, value in parameters_of(only_network(worker)).items():
        torch.testing.assert_close(value, theta[name], rtol=1e-4, atol=1e-6)


def test_a_full_round_is_the_plain_mean_of_what_the_workers_sent(tiny, digits):
    coordinator, worker = start(tiny(), digits)
    sent = []
    for task in coordinator.tasks(1):
        update = worker.run(task)
        sent.append(
            decode_update(update.payload.arrays, coordinator.theta, {}, wire_of(coordinator.config))
        )
        coordinator.receive(update)
    coordinator.close_round()
    for name, value in coordinator.theta.items():
        plain = torch.stack([s[name].double() for s in sent]).mean(0)
        torch.testing.assert_close(value.double(), plain, rtol=2**-23, atol=2**-40)


@pytest.mark.parametrize("method", ["FedDM-F", "R-FedDM-S", "T-FedDM-M"])
def test_the_order_of_clients_and_what_ran_before_change_no_bit(tiny, digits, method):
    config = tiny(method=method, model__dropout=0.1)
    first, worker = start(config, digits)
    play(first, worker, 2)
    second, fresh = start(config, digits)
    for round in (1, 2):
        for task in reversed(list(second.tasks(round))):
            second.receive(fresh.run(task))
        second.close_round()
    assert all(torch.equal(first.theta[name], second.theta[name]) for name in first.theta)


@pytest.mark.parametrize(("method", "gamma"), [("FedDM-F", 10), ("R-FedDM-S", 6), ("T-FedDM-S", 6)])
def test_gamma_is_what_the_level_implies(tiny, digits, method, gamma):
    """6 of 10 workers are full at S; top-k drops the same coordinates at all four others."""
    coordinator, worker = start(tiny(method=method, clients=10, local__steps=1), digits)
    summary = play(coordinator, worker, 1)
    assert gamma <= summary.gamma <= 10
    assert summary.gamma == gamma or method == "R-FedDM-S"
    assert summary.trained == 1


@pytest.mark.parametrize("conditional", [False, True])
def test_training_lowers_the_loss(tiny, digits, conditional):
    config = tiny(
        rounds=6,
        local__steps=10,
        local__eta=5e-3,
        local__schedule="constant",
        model__conditional=conditional,
    )
    coordinator, worker = start(config, digits)
    first = play(coordinator, worker, 1)
    for round in range(2, 7):
        for task in coordinator.tasks(round):
            coordinator.receive(worker.run(task))
        last = coordinator.close_round()
    assert last.loss < 0.9 * first.loss
    assert last.holdout_loss < 0.9 * first.holdout_loss


def test_label_dropout_replaces_its_part_of_the_labels_by_no_label(tiny, digits):
    worker = Worker(tiny(model__conditional=True, model__label_dropout=0.25), digits)
    indices = np.resize(np.arange(len(digits)), 20_000)
    _, labels = worker.images.batch(
        indices, torch.Generator().manual_seed(0), np.random.default_rng(0)
    )
    dropped = labels == 10
    assert abs(float(dropped.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert torch.equal(labels[~dropped], digits.labels[torch.from_numpy(indices)][~dropped])


def test_without_label_dropout_nothing_is_drawn_for_it(tiny, digits):
    noise = torch.Generator().manual_seed(0)
    before = noise.get_state()
    images = Worker(tiny(model__conditional=True), digits).images
    _, labels = images.batch(np.arange(64), noise, np.random.default_rng(0))
    assert torch.equal(noise.get_state(), before)
    assert torch.equal(labels, digits.labels[:64])


def test_label_dropout_trains_the_embedding_of_no_label(tiny, digits):
    for part, trained in ((0.0, False), (0.5, True)):
        config = tiny(model__conditional=True, model__label_dropout=part)
        coordinator, worker = start(config, digits)
        before = coordinator.theta["label.weight"][10].clone()
        play(coordinator, worker, 1)
        assert torch.equal(coordinator.theta["label.weight"][10], before) != trained


def test_the_summary_reports_F_on_its_own_scale(tiny, digits):
    config = tiny()
    coordinator, worker = start(config, digits)
    summary = play(coordinator, worker, 1)
    u = PARTITIONS["kappa_minimal"](4.13, 1e-3, 20).numpy()
    Z = sum((u[k] - u[k + 1]) / (1 - math.exp(-2 * u[k])) for k in range(20))
    assert summary.dsm_objective == pytest.approx(summary.loss * Z * 64, rel=1e-9)


def test_the_ledger_counts_the_payloads(tiny, digits):
    coordinator, worker = start(tiny(method="R-FedDM-S"), digits)
    down = up = 0
    for task in coordinator.tasks(1):
        update = worker.run(task)
        down, up = down + task.payload.nbytes, up + update.payload.nbytes
        coordinator.receive(update)
    summary = coordinator.close_round()
    assert (summary.bytes_down, summary.bytes_up) == (down, up)
    assert sum(c.bytes_up for c in summary.clients) == up
    assert summary.dense_bytes == 5 * 4 * coordinator.parameters


def altered(update, numbers=None, arrays=None):
    payload = Payload(
        update.payload.arrays | (arrays or {}), update.payload.numbers | (numbers or {})
    )
    return dataclasses.replace(update, payload=payload)


def nan_values(update):
    packed = update.payload.arrays["leave.bias"]
    bad = torch.full(packed.shape, float("nan")).numpy().tobytes()
    return altered(update, arrays={"leave.bias": Packed("float32", packed.shape, bad)})


BAD = {
    "not finite": nan_values,
    "not float32": lambda u: altered(u, arrays={"leave.bias": Packed("bits", (1,), b"1234")}),
    "not the one agreed on": lambda u: altered(u, numbers={"recipe.keep": 0.5}),
    "round 7": lambda u: dataclasses.replace(u, round=7),
    "duplicate": lambda u: dataclasses.replace(u, client=99),
    "not finite or out of range": lambda u: altered(u, numbers={"loss": float("nan")}),
    "out of range": lambda u: altered(u, numbers={"examples": 2**40}),
    "cannot convert float infinity": lambda u: altered(u, numbers={"images": float("inf")}),
    "recipe: not readable": lambda u: altered(u, numbers={"recipe.seed": float("inf")}),
    "measurement missing": lambda u: dataclasses.replace(
        u,
        payload=Payload(
            u.payload.arrays, {k: v for k, v in u.payload.numbers.items() if k != "images"}
        ),
    ),
}


@pytest.mark.parametrize("complaint", BAD)
def test_a_bad_update_costs_itself_and_nothing_else(tiny, digits, complaint):
    coordinator, worker = start(tiny(), digits)
    clean, _ = start(tiny(), digits)
    for task in list(coordinator.tasks(1)):
        update = worker.run(task)
        if task.client == 2:
            assert not coordinator.receive(BAD[complaint](update))
        else:
            coordinator.receive(update)
    summary = coordinator.close_round()
    assert [complaint in r["reason"] for r in summary.rejected] == [True]
    for task in list(clean.tasks(1)):
        if task.client != 2:
            clean.receive(worker.run(task))
    clean.close_round()
    assert all(torch.equal(coordinator.theta[n], clean.theta[n]) for n in clean.theta)


def test_a_second_update_of_the_same_client_does_not_count(tiny, digits):
    coordinator, worker = start(tiny(), digits)
    task = next(iter(list(coordinator.tasks(1))))
    update = worker.run(task)
    assert coordinator.receive(update)
    assert not coordinator.receive(update)


def test_a_round_without_a_single_update_is_an_error_with_the_reasons(tiny, digits):
    coordinator, _ = start(tiny(), digits)
    for task in list(coordinator.tasks(1)):
        coordinator.reject(task.client, "out of memory")
    with pytest.raises(RuntimeError, match="client 0: out of memory"):
        coordinator.close_round()


def test_a_fraction_of_the_clients_is_drawn_by_seed_and_round(tiny):
    config = tiny(clients=20, round__fraction=0.25)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    draws = [tuple(coordinator.participants(r)) for r in range(1, 9)]
    assert all(len(set(draw)) == 5 for draw in draws)
    assert len(set(draws)) > 4
    again = Coordinator(config, parameters_of(build_network(config)))
    assert [tuple(again.participants(r)) for r in range(1, 9)] == draws


def test_the_moving_average_warms_up(tiny, digits):
    config = tiny(ema__decay=0.9)
    coordinator, worker = start(config, digits)
    theta_0 = {n: v.clone() for n, v in coordinator.theta.items()}
    play(coordinator, worker, 1)
    for name, average in coordinator.ema.items():
        expected = 2 / 11 * theta_0[name] + 9 / 11 * coordinator.theta[name]
        torch.testing.assert_close(average, expected)


def test_weighting_by_examples_uses_each_clients_number_of_images(tiny, digits):
    config = tiny(round__weighting="examples", data__partition="dirichlet", clients=2)
    coordinator, worker = start(config, digits)
    sent, weights = [], []
    for task in coordinator.tasks(1):
        update = worker.run(task)
        sent.append(
            decode_update(update.payload.arrays, coordinator.theta, {}, wire_of(coordinator.config))
        )
        weights.append(update.payload.numbers["examples"])
        coordinator.receive(update)
    coordinator.close_round()
    assert weights[0] != weights[1]
    name = "leave.weight"
    mean = sum(w * s[name].double() for w, s in zip(weights, sent, strict=True)) / sum(weights)
    torch.testing.assert_close(coordinator.theta[name].double(), mean, rtol=2**-23, atol=2**-39)


def test_of_three_or_more_no_client_counts_more_than_all_others_together(tiny, digits):
    """Said when they joined: 90,000 by one who lies, and about as many as they have by others."""
    config = tiny(round__weighting="examples", clients=3)
    coordinator, worker = start(config, digits)
    coordinator.participation.images = {0: 700, 1: 90_000, 2: 800}
    sent, counts = [], []
    for task in coordinator.tasks(1):
        update = worker.run(task)
        wire = wire_of(coordinator.config)
        sent.append(decode_update(update.payload.arrays, coordinator.theta, {}, wire))
        if task.client == 1:
            update.payload.numbers["examples"] = 90_000
        counts.append(update.payload.numbers["examples"])
        assert coordinator.receive(update)
    weights = [counts[0], 1500, counts[2]]
    assert [client.weight for client in coordinator.close_round().clients] == weights
    name = "leave.weight"
    mean = sum(w * s[name].double() for w, s in zip(weights, sent, strict=True)) / sum(weights)
    torch.testing.assert_close(coordinator.theta[name].double(), mean, rtol=2**-23, atol=2**-39)


@pytest.mark.parametrize(
    ("said", "asked", "most"),
    [
        ({0: 5, 1: 10}, [0, 1], math.inf),  # of two, one has more than the other
        ({0: 5, 1: 10, 2: 20}, [0, 1, 2], 15),
        ({0: 5, 1: 10, 2: 20, 3: 1000}, [0, 1, 2], 15),  # the fourth is not asked
        ({0: 5, 2: 20}, [0, 1, 2], math.inf),  # as in one process, where nobody says anything
    ],
)
def test_what_bounds_a_client_is_what_the_others_of_its_round_said(tiny, said, asked, most):
    participation = Participation(Setup.of(tiny(clients=4)))
    participation.images = said
    assert participation.heaviest(max(said, key=lambda c: said[c] * (c in asked)), asked) == most


def test_eta_warms_up_and_falls(tiny):
    config = tiny(local__warmup=3, local__schedule="cosine", local__eta=1.0, rounds=10)
    etas = [eta_of(config.local, config.rounds, r) for r in range(1, 11)]
    assert etas[0] == pytest.approx(0.25)
    assert max(etas) == etas[3]
    assert etas[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
