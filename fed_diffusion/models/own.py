"""A network of the user's own: what model.name may name beside the built-in U-Net."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fed_diffusion.config.schema import ModelConfig


class NetworkFactory(Protocol):
    """What model.name names: a class of networks, or a function that makes one.

    Parameters
    ----------
    model
        The section `model` of the configuration.
    channels, size
        The channels of the images, 1 or 3, and their side in pixels.
    classes
        How many labels to condition on; None for a network without labels. With
        model.label_dropout the label `classes` means "no label".

    Returns
    -------
    nn.Module
        The network is called as network(x, u, labels): x_u float32 [n, C, H, W], times to data u
        float64 [n], labels int64 [n] or None. It returns an estimate of the noise eps,
        shaped like x. Start values are drawn from torch's global generator, which is seeded by the
        run. Every parameter is trained and travels. Buffers do not travel, so what must be the same
        on all machines has to be a parameter. For worker.checkpointing it has the methods that
        `models.checkpointing` names.
    """

    def __call__(
        self, model: ModelConfig, channels: int, size: int, classes: int | None, /
    ) -> nn.Module: ...


def check_network(network: nn.Module, channels: int, size: int, classes: int | None) -> None:
    """Let a network see two black images, and refuse one that does not return a noise estimate.

    Raises
    ------
    TypeError, ValueError
        The network has no parameters, or its result is not shaped like the images.
    """
    if next(network.parameters(), None) is None:
        raise ValueError("the network has no parameters, so there is nothing to train")
    x, u = torch.full((2, channels, size, size), -1.0), torch.ones(2, dtype=torch.float64)
    labels = None if classes is None else torch.zeros(2, dtype=torch.int64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        eps = network.eval()(x, u, labels)
    if not isinstance(eps, Tensor):
        raise TypeError(f"the network returns a {type(eps).__name__}, not a tensor")
    if eps.shape != x.shape:
        raise ValueError(
            f"the network returns {list(eps.shape)} for images of {list(x.shape)}; its estimate of "
            "the noise is shaped like the images"
        )
