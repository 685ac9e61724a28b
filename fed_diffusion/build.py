"""From the configuration to a time grid and a network: what is built in, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fed_diffusion.common.compute import arithmetic
from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.common.rng import Purpose, seed_torch
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.names import refuse_unknown
from fed_diffusion.data import (
    class_count,
    image_shape,
)
from fed_diffusion.diffusion.loss import Network
from fed_diffusion.diffusion.partitions import PARTITIONS, TimeGrid, check_times
from fed_diffusion.masks.channels import ordered
from fed_diffusion.masks.families import family_of
from fed_diffusion.masks.levels import keep_ratios
from fed_diffusion.masks.spaces import Layout, layout_of
from fed_diffusion.masks.subnetwork import resized
from fed_diffusion.models import from_diffusers
from fed_diffusion.models.from_diffusers import DiffusersNetwork
from fed_diffusion.models.own import NetworkFactory, check_network
from fed_diffusion.models.unet import UNet, reset
from fed_diffusion.store.start import hash_of, start_of

NETWORKS = ("unet", from_diffusers.NAME)
"""The names of networks that are built in."""


def time_grid(config: Config, steps: int | None = None) -> Tensor:
    """The partition of time u_0 = T > ... > u_K = delta, float64 [K + 1].

    Parameters
    ----------
    steps
        Default: diffusion.K.

    Raises
    ------
    ConfigError
        There is no such partition, or the user's own gives something else.
    """
    diffusion = config.diffusion
    key, name = "diffusion.partition", diffusion.partition
    K = diffusion.K if steps is None else steps
    make: TimeGrid = resolve(key, name, PARTITIONS)
    with blamed(key, name):
        try:
            u = make(diffusion.T, diffusion.delta, K)
            if name not in PARTITIONS:
                check_times(u, diffusion.T, diffusion.delta, K)
        except ValueError as error:
            asked = "" if steps is None else f"evaluation.steps = {steps} cannot be used with "
            raise ConfigError(f"{asked}{key} = {name!r}: {error}") from error
    return u


def build_network(config: Config) -> nn.Module:
    """The score network with its initial theta_0: what the run starts from, else drawn values.

    Raises
    ------
    ConfigError
        As of `new_network`; or what the run starts from cannot be read, or is of another network.
    """
    network = new_network(config)
    start = start_of(config.model, parameters_of(network))
    if start is not None:
        for name, parameter in parameters_of(network).items():
            parameter.copy_(start[name])
    return network


def with_start(config: Config) -> Config:
    """The configuration with what a run notes of its network when it begins.

    That is the description of a diffusers network, and the hash of the values it starts from.
    """
    model = config.model
    noted: dict[str, Any] = {}
    if model.name == from_diffusers.NAME:
        noted["network"] = from_diffusers.describe(model)
    config = config.model_copy(update={"model": model.model_copy(update=noted)})
    start = start_of(model, parameters_of(skeleton(config)))
    if start is not None:
        noted["start_hash"] = hash_of(start)
    return config.model_copy(update={"model": model.model_copy(update=noted)})


def new_network(config: Config) -> nn.Module:
    """The score network with drawn values, the same bits for the same seed.

    Under the baseline `small` it is the smallest worker's sub-network, which everyone trains. A
    network of the user's own, `model.name: module:Net`, is made as `NetworkFactory` says.

    Raises
    ------
    ConfigError
        Names model.name or model.widths and what does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        seed_torch(config.seed, Purpose.INIT)
        if config.model.name != "unet":
            if config.pruning.baseline == "small":
                raise ConfigError(
                    "pruning.baseline = 'small' shrinks the built-in U-Net; with "
                    f"model.name = {config.model.name!r} name a smaller network instead."
                )
            return _other_network(config)
        if config.pruning.baseline != "small":
            return _unet(config)
        return reset(resized(_meta_unet(config), _smallest(config)))


def skeleton(config: Config) -> nn.Module:
    """The structure of `build_network(config)`; the U-Net's has no memory behind it (meta)."""
    if config.model.name != "unet":
        return new_network(config)
    if config.pruning.baseline == "small":
        return resized(_meta_unet(config), _smallest(config), device="meta")
    return _meta_unet(config)


def check_structure(config: Config) -> None:
    """Refuse a network that cannot be built, or one that is no noise estimate.

    What it starts from is checked where the run begins; a run that goes on does not need it.
    """
    network = skeleton(config)
    if isinstance(network, DiffusersNetwork):
        from_diffusers.check_range(network, config.diffusion.T, config.diffusion.delta)
    if config.model.name != "unet":
        with blamed("model.name", config.model.name):
            check_network(network, *_images(config))
    if config.model.start_hash is None:
        start_of(config.model, parameters_of(network))


def channel_layout(config: Config) -> Layout | None:
    """The network's channel spaces, where workers drop whole channels; else None.

    Raises
    ------
    ConfigError
        Channels of a network of one's own: which belong together is not known.
    """
    if not family_of(config.pruning, config.seed).shrinks:
        return None
    try:
        return layout_of(skeleton(config))
    except TypeError as error:
        raise ConfigError(f"pruning.kind = {config.pruning.kind!r}: {error}.") from error


def _smallest(config: Config) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes in the sub-network of the smallest keep ratio."""
    layout = layout_of(_meta_unet(config))
    try:
        counts = layout.counts(min(keep_ratios(config)))
    except ValueError as error:
        raise ConfigError(f"pruning: {error}.") from error
    return layout.shapes_of(layout.blocks(ordered(layout, counts)))


def _meta_unet(config: Config) -> UNet:
    with torch.device("meta"):
        return _unet(config)


def _unet(config: Config) -> UNet:
    channels, size, classes = _images(config)
    model = config.model
    refuse_unknown("model.name", model.name, NETWORKS)
    factor = 2 ** (len(model.widths) - 1)
    if size % factor:
        raise ConfigError(
            f"model.widths has {len(model.widths)} levels, which halve the image "
            f"{len(model.widths) - 1} times; data.size = {size} is not a multiple of {factor}. "
            "Use fewer levels, or images of another size: data.pad adds a border, data.resize "
            "scales."
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


def _images(config: Config) -> tuple[int, int, int | None]:
    """Channels and size of the images, and how many labels to condition on."""
    channels, size, _ = image_shape(config.data)
    classes = class_count(config.data) if config.model.conditional else None
    if config.model.conditional and classes is None:
        raise ConfigError(
            f"model.conditional = True needs labels, and data.name = {config.data.name!r} names no "
            "number of classes. Images without classes, or of which only some have one, need "
            "model.conditional=false; else set data.classes (for image_folder: to the number of "
            "class folders)."
        )
    return channels, size, classes


def _other_network(config: Config) -> nn.Module:
    channels, size, classes = _images(config)
    name = config.model.name
    refuse_unknown("model.name", name, NETWORKS)
    if name == from_diffusers.NAME:
        description = from_diffusers.describe(config.model)
        return from_diffusers.network_of(description, channels, classes, config.model.label_dropout)
    factory: NetworkFactory = resolve("model.name", name, {})
    with blamed("model.name", name):
        network = factory(config.model, channels, size, classes)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.name = {name!r} gave no torch.nn.Module.")
    return network


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """theta: every trained tensor by name, detached views that share the network's memory."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def evaluator(network: Callable[..., Tensor], config: Config, device: torch.device) -> Network:
    """A network as the function that losses and samplers call, in the configured precision."""

    def evaluate(x: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        with arithmetic(config, device):
            return network(x, u, labels).float()

    return evaluate


def network_with(config: Config, theta: dict[str, Tensor]) -> nn.Module:
    """A network that holds theta, in evaluation mode."""
    network = new_network(config)
    for name, parameter in parameters_of(network).items():
        parameter.copy_(theta[name])
    return network.eval()
