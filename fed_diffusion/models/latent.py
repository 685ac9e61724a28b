"""Latent diffusion: an AutoencoderKL of diffusers stands between the images and the network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fed_diffusion.config.schema import ConfigError
from fed_diffusion.models.described import INSTALL, first_line, found

Shape = tuple[int, int, int]


def seen_shape(source: str | None, pixels: Shape) -> Shape:
    """The shape of what the network sees: of the image's latents, or of the image itself.

    Parameters
    ----------
    source
        model.vae, of which only the configuration is read.

    Raises
    ------
    ConfigError
        There is no such autoencoder, or it is for other images.
    """
    if source is None:
        return pixels
    config = _config(source)
    channels, height, width = pixels
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if config["in_channels"] != channels or config["out_channels"] != channels:
        raise ConfigError(
            f"model.vae = {source!r} is for images of {config['in_channels']} channels, and the "
            f"images have {channels} (data.channels)."
        )
    if height % factor or width % factor:
        raise ConfigError(
            f"model.vae = {source!r} makes images {factor} times smaller, and data.size = {height} "
            f"is not a multiple of {factor}. Set data.resize or data.pad to one that is."
        )
    return config["latent_channels"], height // factor, width // factor


class Autoencoder:
    """An AutoencoderKL with its weights, which are never trained.

    Latents are (mean - shift) * scale, where mean is that of the posterior, and scale and shift are
    the autoencoder's own (`scaling_factor`, `shift_factor`).

    Raises
    ------
    ConfigError
        The weights cannot be read.
    """

    def __init__(self, source: str):
        config = _config(source)
        import diffusers

        try:
            self.vae: Any = diffusers.AutoencoderKL.from_pretrained(
                source,
                subfolder=_subfolder(source),
                torch_dtype=torch.float32,
                use_safetensors=True,  # never a pickle
                low_cpu_mem_usage=False,
            )
        except Exception as error:  # no file, no network, a damaged file: diffusers says which
            raise ConfigError(
                f"model.vae = {source!r}: its weights cannot be read from a .safetensors file "
                f"({type(error).__name__}: {first_line(error)})."
            ) from error
        self.vae.requires_grad_(False).eval()
        self.scale: float = config["scaling_factor"]
        self.shift: float = config.get("shift_factor") or 0.0

    def values(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return dict(self.vae.state_dict())

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the autoencoder to a device; returns it."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images in [-1, 1]."""
        latents: Tensor = self.vae.encode(images).latent_dist.mode()
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""
        images: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return images


def _config(source: str) -> Mapping[str, Any]:
    if find_spec("diffusers") is None:
        raise ConfigError(f"model.vae needs the package diffusers: {INSTALL}.")
    import diffusers

    config = found(diffusers.AutoencoderKL, source, _subfolder(source))
    if config is None or "latent_channels" not in config:
        raise ConfigError(
            f"model.vae = {source!r} holds no AutoencoderKL: the folder of a pipeline has "
            "vae/config.json, and that of an autoencoder has config.json. A name on the Hub needs "
            "a network, or a copy in the Hub's cache."
        )
    return {"scaling_factor": 0.18215} | config


def _subfolder(source: str) -> str | None:
    """Where the autoencoder is: in vae/ of a pipeline, else in the folder itself."""
    import diffusers

    return "vae" if found(diffusers.AutoencoderKL, source, "vae") is not None else None
