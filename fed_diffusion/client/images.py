"""The images that stay on a client's machine: whose they are, and the batches made of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fed_diffusion.build import Setup
from fed_diffusion.client.latents import encoded
from fed_diffusion.client.texts import embedded
from fed_diffusion.common.rng import Purpose, generator
from fed_diffusion.data import (
    ImageSet,
    Share,
    augmentation,
    class_count,
    load_dataset,
    split_holdout,
    to_unit,
)
from fed_diffusion.theory.estimates import second_moment

MOMENT_IMAGES = 1024
"""Images that M_{n,2} looks at together: a client's images are not copied whole."""


class ClientImages:
    """The images of one machine, resident on its device, for whichever client's turn it is.

    Parameters
    ----------
    dataset
        Default: what the configuration names.
    own
        The data set is that of one client alone; see `Worker`.
    """

    def __init__(self, setup: Setup, dataset: ImageSet | None, own: bool):
        self._config = setup.config
        self._device = setup.device
        self.dataset = dataset if dataset is not None else load_dataset(setup.config.data)
        self.shares = None if own else setup.shares(self.dataset)
        """What each client holds; None where all images are one client's."""
        # once: bytes, a GPU has room for them; or latents, which are few
        self._encoded = encoded(setup, self.dataset)
        self._images = (self.dataset.images if self._encoded is None else self._encoded).to(
            self._device
        )
        labels = self.dataset.labels if setup.config.model.conditional else None
        self._no_label = class_count(setup.config.data) or 0  # the label behind the last class
        self._table: Tensor | None = None
        if (texts := embedded(setup, self.dataset)) is not None:  # labels are numbers of texts
            self._table, labels = texts.table, texts.numbers  # a file in memory: they may be many
            self._no_label = len(texts.table) - 1
        self._labels = None if labels is None else labels.to(self._device)
        self._moments: dict[int, float] = {}
        self._augment = augmentation(setup.config.data)

    def of(self, client: int) -> Share:
        """What a client trains on and holds out, as indices of the images."""
        if self.shares is not None:
            return self.shares[client]
        config, every = self._config, np.arange(len(self.dataset))
        return split_holdout(every, config.data.holdout, config.seed, client)

    def second_moment(self, client: int) -> float:
        """M_{n,2} of the images that a client trains on, exact; computed once."""
        if client not in self._moments:
            index = torch.from_numpy(self.of(client).train)
            seen = self.dataset.images if self._encoded is None else self._encoded
            parts = ((part, seen[part]) for part in index.split(MOMENT_IMAGES))
            total = math.fsum(len(part) * second_moment(images) for part, images in parts)
            self._moments[client] = total / len(index)
        return self._moments[client]

    def batches(self, round: int, client: int, train: np.ndarray, steps: int) -> list[np.ndarray]:
        """Image indices of each step, from one random order of the client's images after another.

        With local.epochs each order is cut by itself, and its last batch may be smaller. With
        local.steps they are strung together, so that every batch is full.
        """
        local = self._config.local
        draw = generator(self._config.seed, Purpose.BATCHES, round, client)
        if local.epochs is not None:
            cuts = range(local.batch, len(train), local.batch)
            orders = [draw.permutation(train) for _ in range(local.epochs)]
            return [batch for order in orders for batch in np.split(order, cuts)]
        needed = steps * local.batch
        orders = [draw.permutation(train) for _ in range(-(-needed // len(train)))]
        return list(np.concatenate(orders)[:needed].reshape(steps, -1))

    def batch(
        self, index: Tensor, noise: torch.Generator, changes: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] as training sees them, changed at random, or their latents with
        model.vae; and their labels, or with model.text their embedded captions.
        """
        pixels = self._images[index]
        if self._augment is not None:
            pixels = self._augment(pixels, changes)
        images = self._seen(pixels)
        if self._config.data.flip:
            flipped = torch.rand(len(images), generator=noise, device=self._device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        labels = self._labels_of(index)
        if labels is not None and (part := self._config.model.label_dropout):
            dropped = torch.rand(len(labels), generator=noise, device=self._device) < part
            labels = torch.where(dropped, self._no_label, labels)
        return images, self._told(labels)

    def plain(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] as they are, or their latents; and their labels."""
        return self._seen(self._images[index]), self._told(self._labels_of(index))

    def _seen(self, pixels: Tensor) -> Tensor:
        return to_unit(pixels) if self._encoded is None else pixels

    def _labels_of(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[index]

    def _told(self, labels: Tensor | None) -> Tensor | None:
        """What the network is told: the labels themselves, or the embedded texts."""
        if labels is None or self._table is None:
            return labels
        return self._table[labels.cpu()].to(self._device)
