"""One step from the configuration to objects: `Setup.of(config)`, made once and handed down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fed_diffusion.common.compute import arithmetic, device_of, precision_on
from fed_diffusion.common.plugins import blamed, resolve
from fed_diffusion.common.rng import Purpose, seed_torch
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.names import refuse_unknown
from fed_diffusion.config.schema import DiffusionConfig
from fed_diffusion.data import ImageSet, Share, class_count, image_shape, named_classes, shares_of
from fed_diffusion.diffusion.loss import DSMLoss, Network
from fed_diffusion.diffusion.partitions import PARTITIONS, TimeGrid, check_times
from fed_diffusion.masks.families import Family, family_of
from fed_diffusion.masks.levels import keep_ratios
from fed_diffusion.masks.plan import known_ratios
from fed_diffusion.masks.spaces import Layout, layout_of, ranks_of
from fed_diffusion.masks.subnetwork import Undrawn, sub_network
from fed_diffusion.models import from_diffusers, lora
from fed_diffusion.models.built_in import unet_of
from fed_diffusion.models.from_diffusers import DiffusersNetwork
from fed_diffusion.models.latent import Autoencoder, seen_shape
from fed_diffusion.models.own import NetworkFactory, check_network
from fed_diffusion.models.unet import UNet, reset
from fed_diffusion.store.start import autoencoder_of, hashes_of, start_of

NETWORKS = ("unet", from_diffusers.NAME)
"""The names of networks that are built in."""


@dataclass(frozen=True, eq=False)
class Setup:
    """The objects that a configuration describes, each made when it is first asked for, and once.

    Whoever needs one of them is handed the setup, and makes none anew. Nothing in it depends on a
    round, and nobody changes it.

    Attributes
    ----------
    config
        The configuration of the run.
    """

    config: Config
    _split: list[tuple[ImageSet, list[Share]]] = field(default_factory=list, init=False, repr=False)
    """The images that were split last, and how."""

    @classmethod
    def of(cls, run: Config | Setup) -> Setup:
        """The setup of a configuration; a setup is returned as it is."""
        return run if isinstance(run, Setup) else cls(run)

    # --- images ---------------------------------------------------------------------------------

    @cached_property
    def pixels(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return image_shape(self.config.data)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees: the images, or their latents with model.vae."""
        return seen_shape(self.config.model.vae, self.pixels)

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """What is between the images and the network, on this machine's device; None: nothing."""
        return autoencoder_of(self.config.model, self.device)

    @cached_property
    def d(self) -> int:
        """The number of values that the network sees of an image."""
        return math.prod(self.shape)

    @cached_property
    def classes(self) -> int | None:
        """How many labels the network is conditioned on; None where it knows no labels."""
        return class_count(self.config.data) if self.config.model.conditional else None

    def shares(self, dataset: ImageSet) -> list[Share]:
        """What each client trains on and holds out, as indices of the images that all share."""
        if not any(known is dataset for known, _ in self._split):
            config = self.config
            found = shares_of(dataset, config.data, config.clients, config.seed)
            self._split[:] = [(dataset, found)]
        return self._split[0][1]

    # --- time and the loss ----------------------------------------------------------------------

    @cached_property
    def u(self) -> Tensor:
        """The partition of time that the loss is of, float64 [K + 1]."""
        return time_grid(self.config.diffusion)

    def sampling_times(self, steps: int | None = None) -> Tensor:
        """The partition that samples are made on; `steps` defaults to evaluation.steps.

        Raises
        ------
        ConfigError
            The partition cannot be so short.
        """
        config = self.config
        return time_grid(config.diffusion, config.evaluation.steps if steps is None else steps)

    @cached_property
    def loss(self) -> DSMLoss:
        """The estimator of F_n (5)."""
        return DSMLoss(self.u)

    @cached_property
    def Z(self) -> float:
        """The sum of the loss's weights: F_n = Z d times the simple loss."""
        return self.loss.Z

    # --- the network and its masks --------------------------------------------------------------

    @cached_property
    def skeleton(self) -> nn.Module:
        """The network's structure, of which only shapes may be used; see `skeleton`."""
        return skeleton(self.config)

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """The skeleton's parameters by name, of which only the shapes count."""
        return parameters_of(self.skeleton)

    def network(self, started: bool = True) -> nn.Module:
        """Return a new network that holds theta_0, or drawn values in place of what it starts from.

        See `build_network` and `new_network`.
        """
        return (build_network if started else new_network)(self.config)

    def theta(self, started: bool = True) -> dict[str, Tensor]:
        """Return a new copy of theta_0, by name; see `network`."""
        return parameters_of(self.network(started))

    def network_with(self, theta: dict[str, Tensor]) -> nn.Module:
        """A new network that holds theta, in evaluation mode."""
        network = self.network(started=False)
        for name, parameter in parameters_of(network).items():
            parameter.copy_(theta[name])
        return network.eval()

    def check_network(self) -> None:
        """Refuse a network that cannot be built, or that is no noise estimate.

        What it starts from is checked where the run begins; a run that goes on does not need it.
        """
        config, network = self.config, self.skeleton
        if isinstance(network, DiffusersNetwork):
            from_diffusers.check_range(network, config.diffusion.T, config.diffusion.delta)
        if config.model.name != "unet":
            with blamed("model.name", config.model.name):
                check_network(network, *_images(config))
        if config.model.start_hash is None:
            plain = network if config.lora.rank is None else skeleton(config, adapted=False)
            start_of(config.model, parameters_of(plain))

    @cached_property
    def family(self) -> Family:
        """The mask family; `ConfigError` where there is no such family."""
        return family_of(self.config.pruning, self.config.seed)

    @cached_property
    def layout(self) -> Layout | None:
        """The spaces of the network's channels, or of its adapter's ranks, where workers drop them.

        Raises
        ------
        ConfigError
            Which channels of a network of the user's own belong together is not known.
        """
        if not self.family.shrinks:
            return None
        if self.config.lora.rank is not None:
            return ranks_of(self.skeleton)
        try:
            return layout_of(self.skeleton)
        except TypeError as error:
            kind = self.config.pruning.kind
            raise ConfigError(f"pruning.kind = {kind!r}: {error}.") from error

    def known_ratios(self) -> dict[int, float]:
        """Client -> keep ratio, as far as the configuration knows it; else the nodes say it."""
        return known_ratios(self.config.pruning, self.config.clients)

    # --- how this machine computes --------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """The device of worker.device on this machine."""
        return device_of(self.config.worker)

    @cached_property
    def precision(self) -> Literal["fp32", "tf32", "bf16"]:
        """What a network computes in on this machine's device."""
        return precision_on(self.config.worker, self.device)

    def evaluator(self, network: Callable[..., Tensor]) -> Network:
        """A network as the function that losses and samplers call, in the configured precision."""
        worker, device = self.config.worker, self.device

        def evaluate(x: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
            with arithmetic(worker, device):
                return network(x, u, labels).float()

        return evaluate


def with_class_names(config: Config, dataset: ImageSet | None) -> Config:
    """The configuration with the names of an image folder's classes, as they are numbered.

    So a run's record says them, a resumed run finds that they are the same still, and nodes with
    folders of their own number their classes alike.
    """
    data = named_classes(config.data, dataset)
    return config if data is config.data else config.model_copy(update={"data": data})


def time_grid(diffusion: DiffusionConfig, steps: int | None = None) -> Tensor:
    """The partition of time u_0 = T > ... > u_K = delta, float64 [K + 1].

    Parameters
    ----------
    steps
        The number of steps; by default diffusion.K.

    Raises
    ------
    ConfigError
        There is no such partition, or the user's own breaks the contract.
    """
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
    """Return the score network with its initial theta_0: what the run starts from, else drawn.

    Raises
    ------
    ConfigError
        `new_network` fails, or what the run starts from cannot be read or is of another network.
    """
    network = new_network(config)
    return network if config.lora.rank is not None else _started(config, network)


def _started(config: Config, network: nn.Module) -> nn.Module:
    """Return the network with the values that the run starts from, where there are such."""
    start = start_of(config.model, parameters_of(network))
    if start is not None:
        for name, parameter in parameters_of(network).items():
            parameter.copy_(start[name])
    return network


def with_start(config: Config) -> Config:
    """Return the configuration with what a run notes of its network when it begins.

    That is the description of a diffusers network, and the hash of the values it starts from.
    """
    model = config.model
    noted: dict[str, Any] = {}
    if model.name == from_diffusers.NAME:
        noted["network"] = from_diffusers.describe(model)
        model = model.model_copy(update=noted)
        config = config.model_copy(update={"model": model})
    noted |= hashes_of(config.model, parameters_of(skeleton(config, adapted=False)))
    return config.model_copy(update={"model": model.model_copy(update=noted)}) if noted else config


def new_network(config: Config) -> nn.Module:
    """Return the score network with drawn values, the same bits for the same seed.

    Under the baseline `small` this is the smallest worker's sub-network, which everyone trains. A
    user's network, `model.name: module:Net`, is made as `NetworkFactory` says. With `lora.rank` the
    adapter is drawn, and the network beside it holds what it starts from.

    Raises
    ------
    ConfigError
        The message names model.name or model.widths and what does not fit.
    """
    network = _drawn(config)
    return network if config.lora.rank is None else _adapted(config, _started(config, network))


def _adapted(config: Config, network: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        seed_torch(config.seed, Purpose.ADAPTER)
        lora.adapt(network, config.lora)
    return network


def _drawn(config: Config) -> nn.Module:
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
        return reset(_small(config))


def skeleton(config: Config, adapted: bool = True) -> nn.Module:
    """Return the structure of `build_network(config)`; the U-Net's takes no memory (meta).

    Parameters
    ----------
    adapted
        With the adapter of `lora.rank`; else it is the structure of what is beside the adapter.
    """
    if adapted and config.lora.rank is not None:
        return _adapted(config, skeleton(config, adapted=False))
    if config.model.name != "unet":
        return _drawn(config)
    if config.pruning.baseline == "small":
        return _small(config, "meta")
    return _meta_unet(config)


def _small(config: Config, device: str = "cpu") -> UNet:
    """Return the sub-network of the smallest keep ratio, not initialised."""
    whole, keep = _meta_unet(config), min(keep_ratios(config.pruning, config.clients))
    try:
        return sub_network(whole, layout_of(whole), keep, device)
    except ValueError as error:
        raise ConfigError(f"pruning: {error}.") from error


def _meta_unet(config: Config) -> UNet:
    with torch.device("meta"), Undrawn():
        return _unet(config)


def _unet(config: Config) -> UNet:
    return unet_of(config.model, *_images(config))


def _images(config: Config) -> tuple[int, int, int | None]:
    """Return channels and size of what the network sees, and how many labels to condition on."""
    channels, size, _ = seen_shape(config.model.vae, image_shape(config.data))
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
        return from_diffusers.network_of(description, channels, classes, config.model)
    factory: NetworkFactory = resolve("model.name", name, {})
    with blamed("model.name", name):
        network = factory(config.model, channels, size, classes)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.name = {name!r} did not return a torch.nn.Module.")
    return network


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Return theta: every trained tensor by name, detached views that share the network's
    memory.
    """
    return {name: parameter.detach() for name, parameter in network.named_parameters()}
