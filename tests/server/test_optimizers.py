"""The server's step: FedAvgM, FedAdam and FedYogi under masks, in every mode, and resumed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.config.schema import ServerConfig
from fed_diffusion.engines.local import simulate
from fed_diffusion.experiment import Experiment
from fed_diffusion.masks.mask import Block, Scattered
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.server.optimizers import ServerStep
from fed_diffusion.store.checkpoint import load_checkpoint, save_checkpoint
from server_app.strategy import FedDiffusion
from tests.localgrid import LocalGrid
from tests.test_engines import same_bits

KINDS = ("momentum", "adam", "yogi")


class Reddi:
    """One coordinate, by the equations of Hsu et al. 2019 and Reddi et al. 2021, Algorithm 2."""

    def __init__(self, kind, x):
        self.kind, self.x, self.m, self.v = kind, x, 0.0, 1e-3**2

    def step(self, delta, eta, beta1=0.9, beta2=0.99, tau=1e-3):
        if self.kind == "momentum":
            self.m = beta1 * self.m + delta
            self.x += eta * self.m
            return
        self.m = beta1 * self.m + (1 - beta1) * delta
        if self.kind == "adam":
            self.v = beta2 * self.v + (1 - beta2) * delta**2
        else:
            self.v = self.v - (1 - beta2) * delta**2 * math.copysign(1, self.v - delta**2)
        self.x += eta * self.m / (math.sqrt(self.v) + tau)


def close(step, theta, updates):
    """One round of `updates`: (values, masks)."""
    mean = MaskedMean(theta, max(1, len(updates)))
    for values, masks in updates:
        mean.add(values, masks)
    return step.move(theta, mean.result(), mean)


kept = st.lists(st.booleans(), min_size=4, max_size=4)
rounds = st.lists(st.lists(kept, max_size=3), min_size=1, max_size=6)


@given(history=rounds, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_coordinate_takes_the_published_steps_in_the_rounds_that_train_it(history, kind, seed):
    """A round that nobody trained it in is, to a coordinate, no round at all."""
    noise = torch.Generator().manual_seed(seed)
    theta = {"w": torch.randn(4, generator=noise)}
    step = ServerStep(ServerConfig(optimizer=kind, eta=0.05), theta)
    oracles = [Reddi(kind, float(x)) for x in theta["w"]]
    for masks in history:
        values = [torch.randn(4, generator=noise) for _ in masks]
        updates = [
            ({"w": value[torch.tensor(mask)]}, {"w": Scattered(torch.tensor(mask))})
            for value, mask in zip(values, masks, strict=True)
        ]
        before, theta = theta["w"], close(step, theta, updates)
        for i, oracle in enumerate(oracles):
            here = [float(v[i]) for v, mask in zip(values, masks, strict=True) if mask[i]]
            if here:
                oracle.step(sum(here) / len(here) - float(before[i]), 0.05)
            else:
                assert theta["w"][i] == before[i]
            assert float(theta["w"][i]) == pytest.approx(oracle.x, rel=2e-5, abs=1e-5)


def test_the_state_of_what_nobody_trained_does_not_decay():
    theta = {"w": torch.zeros(3, 4), "b": torch.zeros(4)}
    step = ServerStep(ServerConfig(optimizer="yogi"), theta)
    theta = close(step, theta, [({n: v + 0.1 for n, v in theta.items()}, {})])
    before = {n: v.clone() for n, v in step.tensors()["server"].items()}
    block = Block((3, 4), (((0, 2),), ((1, 3),)))
    none = Scattered(torch.zeros(4, dtype=torch.bool))
    masks = {"w": block, "b": none}
    close(step, theta, [({"w": torch.ones(2, 2), "b": torch.zeros(0)}, masks)])
    after = step.tensors()["server"]
    for slot in ("m", "v"):
        moved = after[f"{slot}.w"] != before[f"{slot}.w"]
        assert torch.equal(moved, block.dense())
        assert torch.equal(after[f"{slot}.b"], before[f"{slot}.b"])


@given(seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_momentum_without_memory_at_eta_1_is_equation_8_to_the_bit(seed):
    noise = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 2, (50,), generator=noise)
    theta = {"w": torch.randn(50, generator=noise) * scale}
    updates = [({"w": torch.randn(50, generator=noise)}, {}) for _ in range(3)]
    plain = ServerStep(ServerConfig(), theta)
    moved = ServerStep(ServerConfig(optimizer="momentum", beta1=0.0), theta)
    assert torch.equal(close(plain, theta, updates)["w"], close(moved, theta, updates)["w"])
    assert plain.tensors() == {}


MODES = {
    "adam": {},
    "yogi": {"round__mode": "buffered", "round__buffer": 2, "wire__differences": True},
}
TURNS = {"pruning__kind": "balanced", "pruning__by": "magnitude", "pruning__keep": [1, 0.5, 0.3]}


@pytest.mark.parametrize("kind", MODES)
def test_both_engines_end_with_the_same_bits(tiny, tmp_path, kind):
    """Under masks that follow theta, whose bits are sent."""
    more = {"evaluation__every": 0, "local__steps": 1, "clients": 3}
    config = tiny(server__optimizer=kind, **TURNS, **more, **MODES[kind])
    simulate(config, tmp_path / "here", processes=1)
    nodes = [{"partition-id": n, "num-partitions": 2, "warm-seconds": 0} for n in range(2)]
    FedDiffusion(Experiment(config, tmp_path / "there")).run(LocalGrid(nodes))
    assert same_bits(tmp_path / "here", tmp_path / "there")
    one, two = (load_checkpoint(tmp_path / it).tensors["server"] for it in ("here", "there"))
    assert set(one) == set(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def play(coordinator, worker, rounds):
    for round in rounds:
        for task in coordinator.tasks(round):
            assert coordinator.receive(worker.run(task))
        coordinator.close_round()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_with_the_state_that_it_had(tiny, digits, tmp_path, kind):
    more = {"local__steps": 1, "clients": 3, "pruning__kind": "random", "pruning__keep": 0.5}
    config = tiny(server__optimizer=kind, **more)
    theta, worker = parameters_of(build_network(config)), Worker(config, digits)
    whole = Coordinator(config, theta)
    play(whole, worker, (1, 2))
    save_checkpoint(tmp_path, whole.tensors(), whole.state())
    found = load_checkpoint(tmp_path)
    slots = ("m",) if kind == "momentum" else ("m", "v")
    assert set(found.tensors["server"]) == {f"{slot}.{name}" for slot in slots for name in theta}
    resumed = Coordinator(config, theta)
    resumed.restore(found.tensors, found.state)
    for coordinator in (whole, resumed):
        play(coordinator, Worker(config, digits), (3,))
    for one, two in zip(whole.tensors().values(), resumed.tensors().values(), strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_checkpoint_without_the_state_is_refused(tiny):
    theta = {"w": torch.zeros(2)}
    plain = Coordinator(tiny(), theta)
    momentum = Coordinator(tiny(server__optimizer="momentum"), theta)
    for one, other in ((plain, momentum), (momentum, plain)):
        with pytest.raises(ValueError, match=r"holds no state of server\.optimizer"):
            other.restore(one.tensors(), one.state())


def test_under_privacy_the_step_does_not_tell_who_took_part(tiny, digits):
    """A coordinate that no participant trained moves by its noise, as those that some did."""
    config = tiny(
        server__optimizer="momentum",
        pruning__kind="random",
        pruning__keep=0.5,
        privacy__clip=0.1,
        wire__differences=True,
        clients=4,
    )
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    before = coordinator.theta
    worker = Worker(config, digits)
    (task, *_) = coordinator.tasks(1)
    assert coordinator.receive(worker.run(task))
    everyone, took = coordinator.open.mean.everyone, coordinator.open.mean.coverage.counts()
    mean = coordinator.open.mean
    theta = coordinator.step.move(before, mean.result(), mean)
    for name, value in before.items():
        assert torch.equal(theta[name] != value, everyone[name] > 0)
    assert any(bool(((everyone[n] > 0) & (took[n] == 0)).any()) for n in before)


def test_a_step_that_is_not_finite_changes_nothing(tiny):
    theta = {"w": torch.zeros(2)}
    step = ServerStep(ServerConfig(optimizer="momentum", eta=1e300), theta)
    with pytest.raises(ConfigError, match=r"server\.optimizer = 'momentum'.*not finite"):
        close(step, theta, [({"w": torch.ones(2)}, {})])
    assert torch.equal(step.tensors()["server"]["m.w"], torch.zeros(2))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"server.eta": 0.1}, r"server\.eta: 0\.1 changes nothing.*optimizer none"),
        ({"server.optimizer": "momentum", "server.tau": 0.1}, "tau: 0.1 changes nothing"),
        ({"server.optimizer": "adams"}, "Did you mean 'adam'"),
        ({"server.optimizer": "adam", "server.beta1": 1}, r"server\.beta1"),
    ],
)
def test_settings_without_effect_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        load_config("digits", given)
