"""The network of an exported run as a model of diffusers; `fed_diffusion` is not needed."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from fed_diffusion.models.unet import UNet  # an export has the classes themselves here


class Network(ModelMixin, ConfigMixin):
    """The noise in x [n, C, H, W] at the times u [n], which are -1/2 log alpha_bar."""

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        size: int = 8,
        widths: list[int] | None = None,
        blocks: int = 1,
        attention: list[int] | None = None,
        group: int = 8,
        head: int = 32,
        dropout: float = 0.0,
        classes: int | None = None,
        prediction: str = "eps",
    ):
        super().__init__()
        options: dict[str, Any] = {"blocks": blocks, "group": group, "head": head}
        options |= {"attention": tuple(attention or ()), "dropout": dropout}
        options |= {"classes": classes, "prediction": prediction}
        self.net = UNet(channels, size, tuple(widths or (8,)), **options)

    def forward(self, x: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """Labels are class numbers [n]; None: no label, or a network without labels."""
        out: Tensor = self.net(x, u, labels)
        return out
