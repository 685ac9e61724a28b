"""What averaging the two factors of an adapter apart loses: the mean of products is another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fed_diffusion.config.schema import LoraConfig, PrivacyConfig, RoundConfig
from fed_diffusion.masks.mask import Masks, mask_of
from fed_diffusion.models import lora

MOST_VALUES = 2**27
"""The values of all clients of a round that are kept until its end, at most; more are not measured.
"""

Theta = Mapping[str, Tensor]


class Gap:
    """How far the product of the mean factors is from the mean of the clients' products B A.

    Both means are those of equation (8), rank by rank. The clients' values are kept until the end
    of the round. Nothing is measured where there is no gap (lora.train = B), under differential
    privacy or secure aggregation, in buffered rounds, where the average is not the mean, and where
    masks keep single values of a rank.
    """

    def __init__(
        self, settings: LoraConfig, rounds: RoundConfig, privacy: PrivacyConfig, theta: Theta
    ):
        self._measures = settings.rank is not None and settings.train == "AB"
        self._measures &= privacy.clip is None and rounds.mode == "synchronous"
        self._measures &= rounds.aggregation == "mean"
        self._scale = settings.scale if settings.rank is not None else 1.0
        self._theta = theta
        self._held: list[tuple[int, int, dict[str, Tensor], Masks]] = []
        self._values = 0

    def add(self, client: int, values: Theta, masks: Masks, weight: int) -> None:
        """Keep the values of an update that counts."""
        if not self._measures:
            return
        mine = {name: values[name] for name in self._theta}
        self._values += sum(value.numel() for value in mine.values())
        dense = all(mask.shrinks or mask.whole for mask in masks.values())
        if self._values > MOST_VALUES or not dense:
            self._measures = False
            self._held.clear()
            return
        self._held.append((client, weight, mine, masks))

    def measured(self) -> dict[str, float] | None:
        """Return the Frobenius norm of the gap over all layers, and its part of the mean product's.

        Both are of (alpha / r) B A.
        """
        if not self._measures or not self._held:
            return None
        self._held.sort(key=lambda one: one[0])  # whatever order the updates came in
        gap = norm = 0.0
        for layer in dict.fromkeys(lora.parted(name)[0] for name in self._theta):
            apart, whole = self._of_layer(layer)
            gap += float(apart.square().sum())
            norm += float(whole.square().sum())
        gap, norm = gap**0.5, norm**0.5
        return {"absolute": self._scale * gap, "relative": gap / norm if norm else 0.0}

    def _of_layer(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return the gap and the mean product of a layer, as matrices."""
        total, first, second = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        for weight, a, b, kept in self._factors(layer):
            total = total + weight * kept
            first = first + weight * a
            second = second + weight * b
        trained = total > 0
        share = torch.where(trained, 1 / total, 0)
        first, second = first * share[:, None], second * share
        apart = sum(
            (b - second * kept) * (weight * share) @ (a - first * kept[:, None])
            for weight, a, b, kept in self._factors(layer)
        )
        assert isinstance(apart, Tensor)
        return apart, apart + second @ first

    def _factors(self, layer: str) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield each client's weight, A and B as float64 matrices with 0 where a rank is dropped,
        and 1 for each rank that is kept.
        """
        names = f"{layer}.{lora.A}", f"{layer}.{lora.B}"
        for _, weight, values, masks in self._held:
            blank = [torch.zeros(self._theta[n].shape, dtype=torch.float64) for n in names]
            kept = [mask_of(masks, n, whole) for n, whole in zip(names, blank, strict=True)]
            a, b = (
                mask.put(values[n].double(), whole).flatten(1)
                for n, mask, whole in zip(names, kept, blank, strict=True)
            )
            yield weight, a, b, kept[0].dense().flatten(1)[:, 0].double()
