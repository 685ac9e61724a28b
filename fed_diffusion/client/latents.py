"""The latents of a machine's images, encoded once (model.vae)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.data import ImageSet, content_hash, to_unit
from fed_diffusion.data.decoded import decoded
from fed_diffusion.store.start import hash_of

BATCH = 64
"""The images that are encoded together; latents depend on it in their last bits, so it is fixed."""


def encoded(setup: Setup, dataset: ImageSet) -> Tensor | None:
    """Return the latents of all images, float32 on the CPU; None without an autoencoder.

    They are kept in the cache of decoded images, so that one process of the machine encodes.
    """
    autoencoder = setup.autoencoder
    if autoencoder is None:
        return None
    config, device = setup.config, setup.device

    def chunks() -> Iterator[np.ndarray]:
        with pinned_threads(config.worker.threads), kernels(config.worker, device):
            for part in dataset.images.split(BATCH):
                latents = autoencoder.encode(to_unit(part.to(device))).float().cpu().contiguous()
                yield latents.numpy().view(np.uint8)

    worker, data = config.worker, config.data
    bits = worker.threads, worker.precision, worker.deterministic  # the last ones depend on them
    noted = config.model.vae_hash or hash_of(autoencoder.values())
    what = [noted, data.name, data.dir, device.type, torch.__version__, *bits]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    channels, height, width = setup.shape
    stored = (len(dataset), channels, height, width * np.dtype(np.float32).itemsize)
    found = decoded(f"latents-{key}", content_hash(dataset)[:32], stored, chunks)
    return torch.from_numpy(found.view(np.float32))
