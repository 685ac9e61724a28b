"""A frozen base in bf16 is what arithmetic in bf16 makes of it anyway."""

import pytest
import torch
from safetensors.torch import load_file

from fed_diffusion.build import Setup, build_network
from fed_diffusion.client.networks import Networks
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.engines.local import simulate
from fed_diffusion.export.folder import export
from fed_diffusion.models import lora
from fed_diffusion.store.rundir import RunDir
from tests.models.pipelines import save_pipeline, save_text_pipeline
from tests.models.test_checkpointing import update_of
from tests.models.test_from_diffusers import models
from tests.models.test_lora import ADAPTED, base  # noqa: F401  (a fixture)
from tests.tiny import TINY

HALF = {"worker.precision": "bf16", "local.steps": 2, "local.batch": 2}


def held(config):
    """The network that a worker holds."""
    setup = Setup.of(config)
    return Networks(setup).holding(setup.theta())[0]


def with_base(config, kind, **worker):
    worker = config.worker.model_copy(update=worker)
    settings = config.lora.model_copy(update={"base": kind})
    return config.model_copy(update={"lora": settings, "worker": worker})


def assert_same_update(config, digits):
    updates = [update_of(with_base(config, name), digits) for name in ("fp32", "bf16")]
    updates.append(update_of(with_base(config, "bf16"), digits, checkpointing=True))
    assert updates[0] == updates[1] == updates[2]


@pytest.mark.parametrize("train", ["AB", "B"])
def test_a_trained_update_has_the_same_bits_on_unequal_workers(base, digits, train):  # noqa: F811
    ranks = {"pruning.kind": "ranks", "pruning.keep": 0.25, "pruning.choice": "rolling"}
    settings = ADAPTED | HALF | ranks | {"model.start": base, "lora.train": train}
    assert_same_update(load_config("digits", settings), digits)


@models
def test_a_trained_update_of_a_network_of_diffusers_has_the_same_bits(digits, tmp_path):
    folder = str(save_pipeline(tmp_path, dropout=0.2))
    named = {"model.name": "diffusers", "model.pretrained": folder, "lora.rank": 4}
    assert_same_update(load_config("digits", TINY | HALF | named), digits)


@models
def test_a_network_that_is_told_a_text_computes_the_same_bits(tmp_path):
    pytest.importorskip("transformers")
    import diffusers

    folder = save_text_pipeline(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").train()
    torch.manual_seed(0)
    lora.adapt(unet, load_config("digits", {"lora.rank": 4, "model.start": "x"}).lora)
    for value in unet.parameters():
        torch.nn.init.normal_(value, std=0.1)
    x, j, text = torch.randn(2, 4, 4, 4), torch.tensor([3.5, 700.0]), torch.randn(2, 5, 16)
    found = []
    for _ in range(2):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(x, j, encoder_hidden_states=text).sample.float()
        out.square().sum().backward()
        found.append([out, *(value.grad for value in unet.parameters())])
        lora.hold_in_bf16(unet)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(value.dtype == torch.bfloat16 for value in unet.buffers())


def test_layers_are_in_bf16_and_normalisations_and_what_is_trained_in_fp32(base):  # noqa: F811
    config = load_config("digits", ADAPTED | HALF | {"model.start": base, "lora.base": "bf16"})
    network = held(config)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    for layer in network.modules():
        is_rounded = isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        for name in {"weight", "bias"} & layer._buffers.keys():
            wanted = torch.bfloat16 if is_rounded else torch.float32
            assert getattr(layer, name).dtype == wanted
    # where a machine computes in fp32, nothing is rounded
    for changes in ({"worker.precision": "auto", "worker.device": "cpu"}, {"lora.base": "fp32"}):
        settings = {"model.start": base, "lora.base": "bf16"} | changes
        network = held(load_config("digits", ADAPTED | HALF | settings))
        assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_what_samples_and_what_is_exported_has_the_base_of_the_file(base, tmp_path):  # noqa: F811
    settings = ADAPTED | HALF | {"model.start": base, "lora.base": "bf16", "rounds": 1}
    config = load_config("digits", settings | {"clients": 1, "evaluation.every": 0})
    simulate(config, tmp_path / "run", processes=1)
    run = RunDir.open(tmp_path / "run")
    network = build_network(run.config())
    file = load_file(base)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in file.items())
    out = load_file(export(run, tmp_path / "out") / "model.safetensors")
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert all(torch.equal(out[n], file[n]) for n in file if "norm" in n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worker.precision": "fp32"}, r"worker\.precision = fp32 needs all bits"),
        ({"worker.precision": "tf32"}, r"set worker\.precision to bf16 or auto"),
        ({"model.name": "mine:Net"}, r"mine:Net does with its weights is not known"),
        ({"lora.rank": None}, r"lora\.base: it describes an adapter"),
        ({"lora.base": "fp16"}, r"lora\.base = 'fp16'"),
    ],
)
def test_a_base_that_would_be_another_function_is_refused(changes, message):
    settings = {"lora.rank": 4, "model.start": "run", "lora.base": "bf16"} | changes
    with pytest.raises(ConfigError, match=message):
        load_config("digits", TINY | settings)
