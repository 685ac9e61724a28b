"""Buffered rounds: synchronous ones where nobody is stale, faster where somebody is slow."""

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError
from fed_diffusion.engines.local import Exchange, run_in_process
from fed_diffusion.experiment import Experiment
from fed_diffusion.generate import RunDir
from fed_diffusion.masks.mask import mask_of
from fed_diffusion.masks.recipe import Recipe
from fed_diffusion.protocol.wire import decode_update
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.server.policies import Buffered, Synchronous
from tests.masks.recipes import masks_of
from tests.tiny import wire_of

SMALL = {"model__widths": [16], "model__group": 4, "wire__differences": True}
SMALL |= {"evaluation__every": 0}
KINDS = {
    "full": {},
    "random": {"method": "R-FedDM-S"},
    "topk": {"method": "T-FedDM-S"},
    "balanced": {"method": "B-FedDM-S"},
    "channels": {"pruning__kind": "channels", "pruning__keep": 0.6, "pruning__choice": "magnitude"},
}


def end_of(config, path, **keywords):
    experiment = Experiment(config, path)
    run_in_process(experiment, processes=1, **keywords)
    return experiment


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("staleness", [0.0, 0.5])
def test_a_buffer_of_all_clients_is_the_synchronous_round_bit_for_bit(
    tiny, tmp_path, kind, staleness
):
    settings = SMALL | KINDS[kind] | {"rounds": 3}
    plain = end_of(tiny(**settings), tmp_path / "plain")
    buffered = end_of(
        tiny(**settings, round__mode="buffered", round__staleness=staleness),
        tmp_path / "buffered",
    )
    assert isinstance(buffered.coordinator.policy, Buffered)
    assert same(plain.coordinator.theta, buffered.coordinator.theta)
    assert same(plain.coordinator.ema, buffered.coordinator.ema)
    assert [s.staleness for s in buffered.history] == [0, 0, 0]


def test_a_buffer_of_one_moves_theta_by_each_update_as_it_comes(tiny, digits):
    """Fully asynchronous, by an independent loop; an update that stands alone is damped as well."""
    config = tiny(**SMALL, round__mode="buffered", round__buffer=1, clients=3)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    theta = {name: value.clone() for name, value in coordinator.theta.items()}
    tasks = {task.client: task for task in coordinator.tasks(1)}
    assert set(tasks) == {0, 1, 2}
    for expected, client in enumerate((2, 0, 1)):
        list(coordinator.tasks(coordinator.round + 1))  # whoever is free gets the newest theta
        update = worker.run(tasks[client])
        began = {name: torch.zeros_like(value) for name, value in theta.items()}
        change = decode_update(update.payload.arrays, began, {}, wire_of(config))
        damped = (1 + expected) ** -0.5
        theta = {name: value + damped * change[name] for name, value in theta.items()}
        assert coordinator.receive(update)
        assert coordinator.enough()
        assert coordinator.close_round().staleness == expected
        for name, value in theta.items():
            torch.testing.assert_close(coordinator.theta[name], value, rtol=0, atol=1e-6)
    assert coordinator.round == 3


def test_a_stale_update_counts_less_per_coordinate(tiny, digits):
    """Two updates in a buffer, one of them a move of theta late: factors 1 and 2^-a, over 2."""
    config = tiny(**SMALL, clients=3, round__mode="buffered", round__buffer=2, round__staleness=1.0)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    first = {task.client: worker.run(task) for task in coordinator.tasks(1)}
    for client in (0, 1):
        coordinator.receive(first[client])
    coordinator.close_round()
    theta = {name: value.clone() for name, value in coordinator.theta.items()}
    second = {task.client: worker.run(task) for task in coordinator.tasks(2)}
    assert set(second) == {0, 1}  # 2 still trains on the first theta
    coordinator.receive(first[2])
    coordinator.receive(second[0])
    coordinator.close_round()
    zeros = {name: torch.zeros_like(value) for name, value in theta.items()}
    late = decode_update(first[2].payload.arrays, zeros, {}, wire_of(config))
    fresh = decode_update(second[0].payload.arrays, zeros, {}, wire_of(config))
    for name, value in theta.items():
        expected = value + (0.5 * late[name] + fresh[name]) / 2
        torch.testing.assert_close(coordinator.theta[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_theta_moves_as_in_fedbuff_per_coordinate_by_those_who_trained_it(tiny, digits, weighting):
    """theta + sum of w_k Delta_k / (1 + s_k)^a over the sum of w_k, in float64, under masks."""
    settings = SMALL | {"clients": 5, "method": "R-FedDM-S", "data__partition": "dirichlet"}
    settings |= {"round__mode": "buffered", "round__buffer": 2, "round__staleness": 0.7}
    config = tiny(**settings, round__weighting=weighting)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker, out, seen = Worker(config, digits), {}, set()
    for pair in ((3, 1), (1, 4), (3, 0), (2, 1)):
        for task in coordinator.tasks(coordinator.round + 1):
            out[task.client] = task.round, worker.run(task)
        before = {name: value.double() for name, value in coordinator.theta.items()}
        top, below = ({n: torch.zeros_like(v) for n, v in before.items()} for _ in range(2))
        for client in pair:
            began, update = out.pop(client)
            stale, numbers = coordinator.round + 1 - began, update.payload.numbers
            seen.add(stale)
            weight = numbers["examples"] if weighting == "examples" else 1
            masks = masks_of(Recipe.from_metrics(numbers), coordinator.theta)
            zeros = {name: torch.zeros_like(value) for name, value in coordinator.theta.items()}
            change = decode_update(update.payload.arrays, zeros, masks, wire_of(config))
            for name, value in change.items():
                kept = mask_of(masks, name, before[name]).dense()
                top[name][kept] += weight * value.double().flatten() * (1 + stale) ** -0.7
                below[name][kept] += weight
            assert coordinator.receive(update)
        coordinator.close_round()
        for name, value in before.items():
            expected = value + torch.where(below[name] > 0, top[name] / below[name], 0.0)
            torch.testing.assert_close(
                coordinator.theta[name].double(), expected, rtol=1e-6, atol=1e-7
            )
    assert seen == {0, 1, 2, 3}


def test_a_worker_trains_once_on_each_theta(tiny, digits):
    config = tiny(**SMALL, clients=3, round__mode="buffered", round__buffer=2)
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    worker = Worker(config, digits)
    (zero, _, _) = list(coordinator.tasks(1))
    coordinator.receive(worker.run(zero))
    assert list(coordinator.tasks(1)) == []  # client 0 waits for theta to move
    assert not coordinator.receive(worker.run(zero))  # and a second copy does not count
    assert "duplicate" in coordinator.open.rejected[0]["reason"]


PACE = [1.0, 1.0, 1.0, 1.0, 5.0]


def test_with_one_slow_worker_the_synchronous_loss_is_reached_in_less_simulated_time(
    tiny, tmp_path
):
    settings = SMALL | {"local__steps": 6, "local__eta": 3e-3, "local__batch": 16}
    settings |= {"round__pace": PACE, "local__schedule": "constant"}
    plain = end_of(tiny(**settings, rounds=6), tmp_path / "plain")
    buffered = end_of(
        tiny(**settings, rounds=40, round__mode="buffered", round__buffer=3), tmp_path / "b"
    )
    goal = plain.history[-1].holdout_loss
    reached = next(s.clock for s in buffered.history if s.holdout_loss <= goal)
    assert plain.history[-1].clock == 30.0
    assert reached < 30.0
    assert max(s.staleness for s in buffered.history) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_simulated_clock_a_resumed_run_ends_with_the_same_bits(tiny, tmp_path, kind):
    settings = SMALL | KINDS[kind] | {"rounds": 7, "round__pace": PACE}
    config = tiny(**settings, round__mode="buffered", round__buffer=2)
    whole = end_of(config, tmp_path / "whole")

    def stop(line):
        if line["round"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_of(config, tmp_path / "part", progress=stop)
    resumed = Experiment.resume(tmp_path / "part")
    run_in_process(resumed, processes=1)
    assert same(whole.coordinator.theta, resumed.coordinator.theta)
    assert same(whole.coordinator.ema, resumed.coordinator.ema)
    clocks = [[s.clock for s in run.history] for run in (whole, resumed)]
    assert clocks[0] == clocks[1]
    held = RunDir(tmp_path / "part").load_checkpoint().tensors
    assert len(held) <= 2 + len(PACE)


def test_without_differences_there_is_nothing_to_add(tiny):
    with pytest.raises(ConfigError, match=r"round\.mode: buffered.*wire\.differences"):
        tiny(round__mode="buffered")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round__buffer": 2}, "needs round.mode buffered"),
        ({"round__mode": "buffered", "round__fraction": 0.5}, "fraction 1"),
        ({"round__pace": [1.0]}, "1 times for clients = 5"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**SMALL, **settings)


def test_the_synchronous_policy_is_the_default(tiny, tmp_path):
    assert type(Experiment(tiny(), tmp_path / "run").coordinator.policy) is Synchronous


def test_with_the_default_buffer_a_client_that_fails_costs_its_update_and_is_asked_again(
    tiny, tmp_path, digits
):
    """The buffer is one update of every client: nobody else could fill the gap."""
    config = tiny(**SMALL, round__mode="buffered", clients=3, rounds=3)
    experiment = Experiment(config, tmp_path / "run", digits)
    worker = Worker(config, digits)

    def run(tasks):
        for task in tasks:
            fails = (task.round, task.client) == (2, 1)
            yield task, OSError("no memory") if fails else worker.run(task)

    experiment.train(Exchange(experiment, run))
    counted = [[client.client for client in line.clients] for line in experiment.history]
    assert counted == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert [entry["client"] for entry in experiment.history[1].rejected] == [1]


@pytest.mark.parametrize(("quorum", "needed"), [(0.5, 2), (1.0, 3), (1, 1), (7, 3)])
def test_a_short_buffer_needs_its_quorum(tiny, quorum, needed):
    config = tiny(**SMALL, round__mode="buffered", clients=3, round__quorum=quorum)
    assert Buffered(config).quorum(3) == needed
