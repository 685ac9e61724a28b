"""The denoising score matching loss (5), with times drawn by the paper's own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fed_diffusion.diffusion.partitions import loss_weights
from fed_diffusion.diffusion.process import diffuse

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A network: eps_theta(x_u [n, C, H, W], u [n], labels [n] or None) -> noise, shaped like x_u."""


@dataclass(frozen=True)
class NoisyBatch:
    """Images with the times and the noise that were drawn for them: its loss is a fixed function.

    Attributes
    ----------
    x0, eps
        Images and noise [n, C, H, W].
    u
        Times [n], stratified over the whole batch.
    labels
        Labels [n], or None.
    """

    x0: Tensor
    u: Tensor
    eps: Tensor
    labels: Tensor | None = None

    def loss(self, network: Network) -> Tensor:
        """Return the simple loss, a scalar."""
        x = diffuse(self.x0, self.eps, self.u)
        return (network(x, self.u, self.labels) - self.eps).square().mean()

    def split(self, images: int) -> list[NoisyBatch]:
        """Yield the batch in parts of at most so many images, without drawing times again."""
        cuts = range(0, len(self.x0), images)
        return [self[start : start + images] for start in cuts]

    def __getitem__(self, part: slice) -> NoisyBatch:
        labels = None if self.labels is None else self.labels[part]
        return NoisyBatch(self.x0[part], self.u[part], self.eps[part], labels)

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class DSMLoss:
    """Monte-Carlo estimator of F_n (5) for a noise-predicting network.

    F_n(theta) = sum_k (gamma_k / sigma_k^2) E ||eps_theta(X_{u_k}, u_k) - eps||^2, k = 0..K-1.
    Drawing k with p_k proportional to gamma_k / sigma_k^2 gives every sample the same weight
    Z = sum_k gamma_k / sigma_k^2; so the simple loss, mean ||eps_theta - eps||^2 over batch and
    dimensions, is an unbiased estimate of F_n / (Z d).

    Parameters
    ----------
    u
        The partition, float64 [K + 1].
    """

    u: Tensor

    @property
    def Z(self) -> float:
        return float(loss_weights(self.u).sum())

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """Return u and the cumulated weights on each device that has asked for them.

        They are summed on the CPU, in a fixed order, and copied once: with a copy in every step, a
        GPU's host would wait.
        """
        return {}

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            u = self.u.to("cpu")
            cdf = torch.cumsum(loss_weights(u), 0)
            self._tables[device] = u.to(device), cdf.to(device)
        return self._tables[device]

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n times u_k, stratified: one in each n-th of the distribution, in random order.

        The order is drawn independently of the data, so each image sees each stratum equally often.
        """
        device = generator.device
        u, cdf = self._table(device)
        strata = torch.randperm(n, generator=generator, device=device)
        jitter = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        k = torch.searchsorted(cdf, (strata + jitter) / n * cdf[-1], right=True)
        return u[k.clamp(max=len(cdf) - 1)]

    def draw(
        self, x0: Tensor, generator: torch.Generator, labels: Tensor | None = None
    ) -> NoisyBatch:
        """Draw the times and the noise of a whole batch."""
        u = self.draw_times(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        return NoisyBatch(x0, u, eps, labels)

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        generator: torch.Generator,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the simple loss of one batch, a scalar; multiply by Z d for F_n."""
        return self.draw(x0, generator, labels).loss(network)
