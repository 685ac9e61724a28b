"""The forward Ornstein-Uhlenbeck process (1), with time counted as u = T - t, the time to data.

X_u | X_0 ~ N(alpha_u X_0, sigma_u^2 I) with alpha_u = e^{-u} and sigma_u^2 = 1 - e^{-2u}.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Score(Protocol):
    """An estimate of grad log q_u(y), the score of the noised data."""

    def __call__(self, y: Tensor, u: Tensor) -> Tensor: ...


def alpha(u: Tensor) -> Tensor:
    """Return the signal scale e^{-u}, in u's dtype."""
    return torch.exp(-u)


def sigma(u: Tensor) -> Tensor:
    """Return the noise scale sqrt(1 - e^{-2u}), by expm1, so that a small u loses no digits."""
    return torch.sqrt(-torch.expm1(-2 * u))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return shape [n] as [n, 1, 1, ...], in `like`'s dtype, so that it multiplies a batch of
    images.
    """
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def diffuse(x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
    """Return X_u = alpha_u x0 + sigma_u eps.

    Parameters
    ----------
    x0, eps
        Images and standard normal noise, [n, ...].
    u
        Times [n], float64.
    """
    return per_image(alpha(u), x0) * x0 + per_image(sigma(u), x0) * eps
