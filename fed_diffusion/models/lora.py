"""LoRA: a small adapter beside the chosen layers of a network whose own values are frozen.

A layer with the weights W computes with W + s B A, where A has r rows, B has r columns, and
s = alpha / r (Hu et al. 2021). A convolution's A is one to r channels, with the layer's own kernel,
and its B is one of 1 x 1. B starts at 0, so that the network starts as what it was.

What is frozen becomes buffers, so a network's parameters are those of the adapter alone. Without
some of its ranks an adapter is the same function as with these ranks at 0: s stays as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fed_diffusion.config.schema import ConfigError, LoraConfig

A, B = "lora_A", "lora_B"
"""The last part of the names of an adapter's tensors, behind the name of their layer."""
STEPS = 2**23
"""A is drawn from so many numbers on either side of 0, which any machine has the same way."""


def parted(name: str) -> tuple[str, str]:
    """The layer that a tensor of an adapter belongs to, and which of the two it is."""
    layer, _, which = name.rpartition(".")
    return layer, which


def adapt(network: nn.Module, settings: LoraConfig) -> None:
    """Freeze a network, and give its chosen layers an adapter that changes nothing yet.

    A is drawn from torch's global generator, layer by layer.

    Raises
    ------
    ConfigError
        lora.targets names no such layer.
    """
    rank, layers = settings.rank, _chosen(network, settings.targets)
    assert rank is not None
    for module in list(network.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, value.detach())
    for layer in layers.values():
        weight: Tensor = layer.weight
        outputs, *inside = weight.shape
        draw = torch.randint(-STEPS, STEPS, (rank, *inside), device=weight.device)
        first = draw.to(weight.dtype) / STEPS * (1 / math.sqrt(math.prod(inside)))
        if settings.train == "B":
            layer.register_buffer(A, first)
        else:
            layer.register_parameter(A, nn.Parameter(first))
        second = weight.new_zeros((outputs, rank, *[1] * (weight.dim() - 2)))
        layer.register_parameter(B, nn.Parameter(second))
        layer.lora_scale = settings.scale
        layer.register_forward_hook(_beside)


def _beside(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What a layer computes with its adapter, given what it computes without."""
    x = inputs[0]
    more: Tensor
    if layer.weight.dim() == 4:
        inner = F.conv2d(x, layer.lora_A, None, layer.stride, layer.padding, layer.dilation)
        more = F.conv2d(inner, layer.lora_B)
    else:
        more = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    return output + more * float(layer.lora_scale)


def _chosen(network: nn.Module, targets: Collection[str]) -> dict[str, Any]:
    """The layers that get an adapter, by name, in the network's order."""
    able = {name: layer for name, layer in network.named_modules() if _is_able(layer)}
    if not able:
        raise ConfigError("lora.rank: the network has no linear layer and no convolution.")
    for target in targets:
        if not any(_is_meant(name, target) for name in able):
            last = {name.rpartition(".")[2] for name in able}
            ends = sorted(name for name in last if not name.isdigit())
            raise ConfigError(
                f"lora.targets: {target!r} is no linear layer or plain convolution of this "
                f"network. There are, by the ends of their names: {', '.join(ends)}."
            )
    return {
        name: layer
        for name, layer in able.items()
        if not targets or any(_is_meant(name, target) for target in targets)
    }


def _is_able(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear  # a class of its own may compute something else


def _is_meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapters(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, with their names."""
    for name, layer in network.named_modules():
        if hasattr(layer, B):
            yield name, layer


def hold_in_bf16(network: nn.Module) -> None:
    """Round the frozen weights and biases of linear layers and convolutions to bf16.

    Under autocast to bf16 the network is the same function to the bit, because autocast rounds them
    in each call and keeps the rounded copy for the backward pass. Normalisations and embeddings,
    which it does not round, stay in fp32, and so does the adapter.
    """
    for layer in network.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            for name in {"weight", "bias"} & layer._buffers.keys():
                value = layer._buffers[name]
                if value is not None:
                    setattr(layer, name, value.to(torch.bfloat16))


def resized(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy with an adapter of these shapes, not initialised; both share what is frozen."""
    memo: dict[int, Any] = {id(value): value for value in network.buffers()}
    memo |= {id(value): nn.Parameter(torch.empty(0)) for value in network.parameters()}
    small = copy.deepcopy(network, memo)
    for name, layer in adapters(small):
        whole: Any = network.get_submodule(name).lora_A
        layer.lora_B = nn.Parameter(whole.new_empty(shapes[f"{name}.{B}"]))
        first = whole.new_empty((layer.lora_B.shape[1], *whole.shape[1:]))
        layer.lora_A = nn.Parameter(first) if f"{name}.{A}" in shapes else first
    return small


def frozen_rows(network: nn.Module) -> dict[str, Tensor]:
    """A of each layer by the layer's name, where lora.train = B and A is no part of theta."""
    return {name: layer.lora_A for name, layer in adapters(network) if A in layer._buffers}


@torch.no_grad()
def merged(network: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The values that a network without an adapter has to have to be the same function.

    Parameters
    ----------
    names
        The names of the network's parameters before it had an adapter.
    """
    values = {name: value for name, value in network.state_dict().items() if name in names}
    for name, layer in adapters(network):
        first, second = layer.lora_A.double().flatten(1), layer.lora_B.double().flatten(1)
        more = layer.lora_scale * (second @ first).view_as(layer.weight)
        values[f"{name}.weight"] = (layer.weight.double() + more).to(layer.weight.dtype)
    return values
