"""Checkpointing: blocks that are computed again change memory and time, and no value."""

import pytest
import torch

from fed_diffusion.build import Setup, build_network, skeleton
from fed_diffusion.checks import check_training
from fed_diffusion.client.budget import demand
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.models import unet
from fed_diffusion.models.checkpointing import checkpointed
from fed_diffusion.server.coordinator import Coordinator
from fed_diffusion.theory.curvature import saved_bytes
from tests.models.pipelines import save_pipeline
from tests.models.test_from_diffusers import models
from tests.tiny import TINY

ATTENTIVE = TINY | {"model.attention": [4], "model.head": 8}
KINDS = {
    "unet": {},
    "with dropout": {"model.dropout": 0.3},
    "with fewer channels": {"pruning.kind": "channels", "pruning.keep": 0.5},
    "in bf16": {"worker.precision": "bf16", "local.steps": 1},
}


def of_diffusers(folder, **changes):
    save_pipeline(folder, dropout=0.2)
    named = {"model.name": "diffusers", "model.pretrained": str(folder)}
    return load_config("digits", TINY | named | changes)


def update_of(config, digits, **worker):
    """What client 0 sends after its first task, and its loss."""
    worker = config.worker.model_copy(update=worker)
    config = config.model_copy(update={"worker": worker})
    setup = Setup.of(config)
    task = next(Coordinator(setup, setup.theta()).tasks(1))
    payload = Worker(setup, digits).run(task).payload
    return {name: bytes(one.data) for name, one in payload.arrays.items()}, payload.numbers["loss"]


def assert_same_update(config, digits):
    plain, again = (update_of(config, digits, checkpointing=on) for on in (False, True))
    assert plain == again


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_update_has_the_same_bits(kind, digits, monkeypatch):
    calls = []
    own = unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    assert_same_update(load_config("digits", ATTENTIVE | KINDS[kind]), digits)
    assert calls


@models
@pytest.mark.parametrize("lora", [{}, {"lora.rank": 4}], ids=["whole", "adapter"])
def test_a_trained_update_of_a_network_of_diffusers_has_the_same_bits(lora, digits, tmp_path):
    assert_same_update(of_diffusers(tmp_path, **lora), digits)


def kept_by(network, on):
    """The bytes that autograd keeps of a forward pass in training, and the gradients."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((8, 1, 8, 8), generator=noise)
    u = torch.rand(8, generator=noise, dtype=torch.float64) + 0.1
    network.train().zero_grad()
    torch.manual_seed(0)
    with checkpointed(network, on), saved_bytes(list(network.parameters())) as kept:
        network(x, u, None).square().mean().backward()
    return kept(), [value.grad.clone() for value in network.parameters()]


def assert_keeps_less(network, share):
    (most, plain), (least, again), (after, _) = (
        kept_by(network, on) for on in (False, True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert least < share * most
    assert after == most  # nothing of it stays


def test_less_is_kept_for_the_backward_pass_and_gradients_have_the_same_bits():
    config = load_config("digits", ATTENTIVE | {"model.dropout": 0.3, "model.widths": [32, 64]})
    assert_keeps_less(build_network(config), 0.4)


@models
def test_less_is_kept_of_a_network_of_diffusers_too(tmp_path):
    assert_keeps_less(build_network(of_diffusers(tmp_path)), 0.9)


def test_a_budget_counts_the_inputs_of_the_stages_and_the_largest_stage():
    def needs(on, **changes):
        changes |= {"worker.checkpointing": on, "local.batch": 32}
        config = load_config("digits", ATTENTIVE | {"model.widths": [32, 64]} | changes)
        return demand(Setup.of(config), skeleton(config), measures=True)

    plain, again = needs(False), needs(True)
    assert 0.2 * plain.activations < again.activations < 0.7 * plain.activations
    assert 1.2 * plain.work < again.work < 1.4 * plain.work
    assert again.parameters == plain.parameters
    # what measures keeps everything
    plain, again = (needs(on, **{"theory.every": 1}) for on in (False, True))
    assert again.activations == plain.activations


def test_a_compiled_step_and_a_network_that_cannot_do_so_are_refused():
    with pytest.raises(ConfigError, match=r"set worker\.compile or worker\.checkpointing to false"):
        load_config("digits", TINY | {"worker.checkpointing": True, "worker.compile": True})
    own = {"model.name": f"{__name__}:plain", "worker.checkpointing": True}
    with pytest.raises(ConfigError, match=r"no enable_gradient_checkpointing\(\).*Give it both"):
        check_training(load_config("digits", TINY | own))


def plain(model, channels, size, classes):
    """A network of the user's own, without checkpointing."""

    class Plain(torch.nn.Conv2d):
        def forward(self, x, u, labels):
            return super().forward(x)

    return Plain(channels, channels, 1)
