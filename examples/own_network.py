"""A network of the user's own: a few convolutions that see the time as one more channel.

    fed-diffusion run digits --set model.name=examples.own_network:Plain

The contract is `fed_diffusion.NetworkFactory`: made from the section `model` of the configuration
and the images' shape, called with x_u [n, C, H, W], times u [n] and labels [n] or None, it returns
an estimate of the noise. Masks of single weights (`pruning.kind=random`, `topk`) work with any
network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fed_diffusion.config.schema import ModelConfig


class Plain(nn.Module):
    """A network of model.blocks + 2 convolutions of model.widths[0] channels, most with a
    residual.
    """

    def __init__(self, model: ModelConfig, channels: int, size: int, classes: int | None):
        super().__init__()
        width = model.widths[0]
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.inner = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(model.blocks)
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        # one label more, which means "no label"
        self.label = nn.Embedding(classes + 1, width) if classes is not None else None

    def forward(self, x: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the noise in x: what is left when an image is taken away, so x itself at large
        u.
        """
        sigma = torch.sqrt(-torch.expm1(-2 * u)).to(x.dtype)[:, None, None, None]
        h = self.first(torch.cat([x, sigma.expand(-1, 1, *x.shape[2:])], dim=1))
        if self.label is not None and labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        for layer in self.inner:
            h = h + layer(nn.functional.silu(h))
        eps: Tensor = sigma * x + self.last(nn.functional.silu(h))
        return eps
