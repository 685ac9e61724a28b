"""Networks from the configuration: the U-Net, or one's own by dotted path."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from fed_diffusion.config import Config, ConfigError
from fed_diffusion.data import class_count, image_shape
from fed_diffusion.models.unet import UNet
from fed_diffusion.rng import Purpose, torch_seed


def build_network(config: Config) -> nn.Module:
    """The score network with its initial theta_0, the same bits for the same seed.

    A network of one's own, `model.name: module:Net`, is called as
    Net(config.model, channels, size, classes) and must map (x, u, labels) to a noise estimate.

    Raises
    ------
    ConfigError
        Names model.name or model.widths and what does not fit.
    """
    channels, size, _ = image_shape(config.data)
    model = config.model
    classes = class_count(config.data) if model.conditional else None
    if model.conditional and classes is None:
        raise ConfigError(
            "model.conditional = True needs labels, and the data set names no number of classes; "
            "set data.classes."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, Purpose.INIT))
        if ":" in model.name:
            return _own_network(config, channels, size, classes)
        if model.name != "unet":
            raise ConfigError(f"model.name = {model.name!r} is unknown. Allowed: unet, module:Net.")
        factor = 2 ** (len(model.widths) - 1)
        if size % factor:
            raise ConfigError(
                f"model.widths has {len(model.widths)} levels, which halve the image "
                f"{len(model.widths) - 1} times; data.size = {size} is not a multiple of {factor}. "
                "Use fewer levels."
            )
        return UNet(
            channels,
            size,
            model.widths,
            blocks=model.blocks,
            attention=model.attention,
            group=model.group,
            head=model.head,
            dropout=model.dropout,
            classes=classes,
            prediction=model.prediction,
        )


def _own_network(config: Config, channels: int, size: int, classes: int | None) -> nn.Module:
    module, _, attribute = config.model.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.name = {config.model.name!r} cannot be loaded: {error}"
        ) from error
    network = factory(config.model, channels, size, classes)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.name = {config.model.name!r} gave no torch.nn.Module.")
    return network


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """theta: every trained tensor by name, detached views that share the network's memory."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}
