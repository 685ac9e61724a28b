"""The pipeline of an exported run: it needs diffusers and torch, and fed_diffusion is not needed.

pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
images = pipe(4, labels=[0, 1, 2, 3]).images
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class FedDiffusionPipeline(DiffusionPipeline):
    """Images by DDIM, from noise down the times u_0 > ... > u_K that the run used.

    Parameters
    ----------
    unet
        The noise in images x at times u, unet(x, u, labels).
    times
        u_k: the signal is e^-u and the noise sqrt(1 - e^-2u).
    denoise
        Whether the last image is replaced by its estimate without noise.
    """

    def __init__(self, unet: Any, times: Sequence[float] = (), denoise: bool = False):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(times=list(times), denoise=denoise)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        labels: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Make images.

        Parameters
        ----------
        labels
            The class of each image, for a network with classes.
        noise
            The start [n, C, H, W]; default: drawn by the generator.
        output_type
            pil, or pt: a tensor in [-1, 1].
        """
        shape = self.unet.config["channels"], self.unet.config["size"], self.unet.config["size"]
        if noise is None:
            noise = torch.randn((batch_size, *shape), generator=generator)
        x = noise.to(self.device)
        given = None if labels is None else torch.tensor(labels, device=self.device)
        u = torch.tensor(self.config["times"], dtype=torch.float64)
        alpha, sigma = torch.exp(-u).tolist(), torch.sqrt(-torch.expm1(-2 * u)).tolist()
        last = len(u) - 1 + int(self.config["denoise"])
        for k in self.progress_bar(range(last)):
            eps = self.unet(x, u[k].expand(len(x)).to(self.device), given)
            x0 = (x - sigma[k] * eps) / alpha[k]
            ahead = (alpha[k + 1], sigma[k + 1]) if k + 1 < len(u) else (1.0, 0.0)
            x = ahead[0] * x0 + ahead[1] * eps
        if output_type == "pt":
            return ImagePipelineOutput(images=x)
        pixels = (x.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).float().cpu().numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels))
