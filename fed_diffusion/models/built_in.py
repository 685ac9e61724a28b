"""The built-in U-Net as the section `model` of a configuration describes it."""

from __future__ import annotations

from fed_diffusion.config.schema import ConfigError, ModelConfig
from fed_diffusion.models.unet import UNet


def unet_of(model: ModelConfig, channels: int, size: int, classes: int | None) -> UNet:
    """Return a new U-Net for such images.

    Raises
    ------
    ConfigError
        The images cannot be halved as often as model.widths has levels.
    """
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
