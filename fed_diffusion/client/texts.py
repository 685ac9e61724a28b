"""The captions of a machine's images, embedded once (model.text)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.common.compute import kernels, pinned_threads
from fed_diffusion.data import ImageSet, captions_of
from fed_diffusion.data.decoded import decoded
from fed_diffusion.store.start import hash_of, text_encoder_of

BATCH = 64
"""The texts that are embedded together; the last bits depend on it, so it is fixed."""


class Texts(NamedTuple):
    """Embedded captions.

    Attributes
    ----------
    table
        float32 [texts + 1, tokens, width]: each different text once, and last the empty one.
    numbers
        int64 [n], which of them each image has.
    """

    table: Tensor
    numbers: Tensor


def embedded(setup: Setup, dataset: ImageSet) -> Texts | None:
    """Return the embedded captions of all images, on the CPU; None without a text encoder.

    They are kept in the cache of decoded images, so that one process of the machine embeds.
    """
    config, device = setup.config, setup.device
    encoder = text_encoder_of(config.model, device)
    if encoder is None:
        return None
    captions = captions_of(dataset, config.data)
    places = {text: place for place, text in enumerate(dict.fromkeys(captions))}
    texts = [*places, ""]

    def chunks() -> Iterator[np.ndarray]:
        with pinned_threads(config.worker.threads), kernels(config.worker, device):
            for start in range(0, len(texts), BATCH):
                part = encoder.encode(texts[start : start + BATCH]).cpu().contiguous()
                yield part.numpy().view(np.uint8)

    worker, data = config.worker, config.data
    bits = worker.threads, worker.precision, worker.deterministic  # the last ones depend on them
    noted = config.model.text_hash or hash_of(encoder.values())
    what = [noted, data.name, data.dir, device.type, torch.__version__, *bits]
    key, state = _hash(what), _hash(texts)
    stored = (len(texts), encoder.tokens, encoder.width * np.dtype(np.float32).itemsize)
    found = decoded(f"texts-{key}", state, stored, chunks)
    numbers = torch.tensor([places[text] for text in captions], dtype=torch.int64)
    return Texts(torch.from_numpy(found.view(np.float32)), numbers)


def _hash(what: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
