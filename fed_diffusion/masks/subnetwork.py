"""Exact sub-networks: a U-Net without some of its channel groups, physically smaller.

The small network computes the function of the whole network with those groups' parameters at zero,
and its gradients are the whole network's masked gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fed_diffusion.masks.channels import ordered
from fed_diffusion.masks.spaces import Channels, Layout, layout_of
from fed_diffusion.models.unet import UNet


def extract(network: UNet, channels: Channels) -> UNet:
    """Return the sub-network that keeps these groups, with their values.

    Parameters
    ----------
    network
        The whole network; it is left as it is.
    channels
        space -> kept groups, for every space of `layout_of(network)`.
    """
    layout = layout_of(network)
    blocks = layout.blocks(channels)
    values = {
        name: blocks[name].take(value.detach()) if name in blocks else value.detach().clone()
        for name, value in network.named_parameters()
    }
    small = resized(network, layout.shapes_of(blocks), device="meta")
    for name, value in values.items():
        module, _, parameter = name.rpartition(".")
        small.get_submodule(module).register_parameter(parameter, nn.Parameter(value))
    return small


def scatter(
    values: Mapping[str, Tensor], channels: Channels, whole: Mapping[str, Tensor], network: UNet
) -> dict[str, Tensor]:
    """Undo `extract`: put a small network's values (or gradients) into the whole tensors.

    Parameters
    ----------
    values
        The values by parameter name, shaped as in the small network.
    whole
        Tensors shaped as in `network`, which what was dropped is taken from.
    """
    blocks = layout_of(network).blocks(channels)
    return {
        name: blocks[name].put(values[name], value.clone())
        if name in blocks
        else values[name].clone()
        for name, value in whole.items()
    }


def sub_network(whole: UNet, layout: Layout, keep: float, device: torch.device | str) -> UNet:
    """Return the sub-network of the first groups at this ratio, not initialised.

    Raises
    ------
    ValueError
        Not even one group everywhere is so small.
    """
    blocks = layout.blocks(ordered(layout, layout.counts(keep)))
    return resized(whole, layout.shapes_of(blocks), device=device)


def resized(
    network: UNet, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str = "cpu"
) -> UNet:
    """Copy the network's structure with parameters of these shapes, not initialised.

    `network` may be on the meta device; then only the copy takes memory.
    """
    blank = nn.Parameter(torch.empty(0))  # the structure is copied, no tensor is
    memo = {id(parameter): blank for parameter in network.parameters()}
    small: UNet = copy.deepcopy(network, memo)
    for (path, module), original in zip(small.named_modules(), network.modules(), strict=True):
        for name, old in original.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            fresh = torch.empty(shapes[full_name], dtype=old.dtype, device=device)
            module.register_parameter(name, nn.Parameter(fresh))
        _state_sizes(module)
    return small


class Undrawn(TorchFunctionMode):
    """Embeddings keep what they are made with: on the meta device there is nothing to draw.

    Drawing normal numbers there imports torch._dynamo, in each process as slow as importing torch.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def _state_sizes(module: nn.Module) -> None:
    """Bring a module's own record of its sizes in line with its parameters."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        module.num_groups = module.num_channels // size
