"""Precision and compilation change how fast a step is; theta stays in fp32."""

import pytest
import torch

from fed_diffusion.build import build_network, parameters_of
from fed_diffusion.client.worker import Worker
from fed_diffusion.protocol.wire import decode_update
from fed_diffusion.server.coordinator import Coordinator
from tests.tiny import wire_of


def trained(config, digits):
    """theta_{1,0,S} of client 0's first task, and its loss."""
    coordinator = Coordinator(config, parameters_of(build_network(config)))
    update = Worker(config, digits).run(next(coordinator.tasks(1)))
    theta = decode_update(update.payload.arrays, coordinator.theta, {}, wire_of(config))
    return theta, update.payload.numbers["loss"]


def test_bf16_trains_an_fp32_theta_to_nearly_the_same_values(tiny, digits):
    plain, loss = trained(tiny(local__steps=2), digits)
    half, half_loss = trained(tiny(local__steps=2, worker__precision="bf16"), digits)
    assert any(not torch.equal(plain[name], half[name]) for name in plain)
    assert half_loss == pytest.approx(loss, rel=0.02)
    for name, value in half.items():
        assert value.dtype == torch.float32
        # two steps of Adam move a value by two step sizes at most
        assert float((value - plain[name]).abs().max()) <= 4.1e-3


def test_auto_computes_in_fp32_on_a_cpu_whatever_instructions_it_has(tiny, digits):
    auto, _ = trained(tiny(worker__precision="auto", worker__device="cpu"), digits)
    named, _ = trained(tiny(worker__precision="fp32", worker__device="cpu"), digits)
    assert all(torch.equal(auto[name], named[name]) for name in auto)


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one_does(tiny, digits):
    plain, loss = trained(tiny(local__steps=2, local__optimizer="sgd"), digits)
    fast, fast_loss = trained(
        tiny(local__steps=2, local__optimizer="sgd", worker__compile=True), digits
    )
    assert fast_loss == pytest.approx(loss, rel=1e-4)
    for name, value in fast.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)
