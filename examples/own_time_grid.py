"""A time grid of the user's own: EDM's, whose steps shrink towards the data as a power says.

    fed-diffusion run digits --set diffusion.partition=examples.own_time_grid:karras

The contract is `fed_diffusion.TimeGrid`: from T, delta and K to the K + 1 times to data
u_0 = T > ... > u_K = delta. Training draws its noise levels from these times, and sampling steps
through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

RHO = 7.0
"""EDM's power (Karras et al. 2022): with 1 the steps are even, above it the last are short."""


def karras(T: float, delta: float, K: int) -> Tensor:
    """Return K even steps in sigma^(1/RHO); sigma^2 = e^(2u) - 1 is EDM's noise level at time u."""
    ends = torch.tensor([T, delta], dtype=torch.float64)
    first, last = torch.expm1(2 * ends).sqrt() ** (1 / RHO)
    sigma = torch.linspace(float(first), float(last), K + 1, dtype=torch.float64) ** RHO
    u = torch.log1p(sigma**2) / 2
    u[0], u[-1] = T, delta  # without the rounding on the way there and back
    return u
