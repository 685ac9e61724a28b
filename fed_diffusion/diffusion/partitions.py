"""Partitions of time u_0 = T > u_1 > ... > u_K = delta.

Each is a pure function that returns K + 1 float64 values. Theorem 4.11 needs steps
gamma_k = u_k - u_{k+1} <= kappa min{1, u_{k+1}}; `kappa` gives the smallest such kappa.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TimeGrid(Protocol):
    """What diffusion.partition names: the times at which the reverse process is stepped.

    Parameters
    ----------
    T, delta
        The first and the last time, T >= 1 > delta > 0, counted as the time to data.
    K
        Steps, at least 1.

    Returns
    -------
    Tensor
        u, float64 [K + 1], falling strictly from u_0 = T to u_K = delta. The same arguments give
        the same bits on every machine.

    Raises
    ------
    ValueError
        There is no such partition; the message says which argument to change.
    """

    def __call__(self, T: float, delta: float, K: int, /) -> Tensor: ...


def gammas(u: Tensor) -> Tensor:
    """Return the step lengths gamma_k = u_k - u_{k+1}, shape [K]."""
    return u[:-1] - u[1:]


def kappa(u: Tensor) -> float:
    """Return the smallest kappa with gamma_k <= kappa min{1, u_{k+1}} for every k (Lemma 4.5)."""
    return float((gammas(u) / u[1:].clamp(max=1.0)).max())


def loss_weights(u: Tensor) -> Tensor:
    """Return gamma_k / sigma_k^2, k = 0..K-1: the weights of (5) on the noise prediction, [K]."""
    return gammas(u) / -torch.expm1(-2 * u[:-1])


def kappa_minimal(T: float, delta: float, K: int) -> Tensor:
    """Return the partition with the smallest kappa that K steps from T to delta can have.

    Every step takes equality, u_{k+1} = max(u_k - kappa, u_k / (1 + kappa)), which no admissible
    partition of the same kappa can outrun.

    Raises
    ------
    ValueError
        Unless delta < 1 <= T and K >= log(1/delta) (the condition of Remark 4.12).
    """
    _check(T, delta, K)
    if math.log(1 / delta) > K:
        raise ValueError(f"K = {K} is below log(1/delta) = {math.log(1 / delta):.2f} (Remark 4.12)")
    low, high = 0.0, T / delta  # one step of kappa = T / delta goes all the way
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _steps_needed(T, delta, middle) <= K:
            high = middle
        else:
            low = middle
    u = [T]
    for _ in range(K):
        u.append(max(u[-1] - high, u[-1] / (1 + high), delta))
    u[-1] = delta  # the rolled-out root can miss the end by rounding
    return torch.tensor(u, dtype=torch.float64)


def _steps_needed(T: float, delta: float, kappa: float) -> int:
    even = math.ceil(max(T - 1 - kappa, 0.0) / kappa)
    rest = T - kappa * even
    return even + max(math.ceil(math.log(rest / delta) / math.log1p(kappa)), 0)


def half_half(T: float, delta: float, K: int) -> Tensor:
    """Take floor(K/2) even steps from T to 1, the rest geometric to delta (Benton et al. 2024)."""
    _check(T, delta, K)
    if T <= 1 or K < 2:
        raise ValueError(f"half_half needs T > 1 and K >= 2; T = {T}, K = {K}")
    even = K // 2
    first = torch.linspace(T, 1.0, even + 1, dtype=torch.float64)
    return torch.cat([first, geometric(1.0, delta, K - even)[1:]])


def geometric(T: float, delta: float, K: int) -> Tensor:
    """Take steps with equal ratios u_{k+1} / u_k."""
    _check(T, delta, K)
    u = torch.exp(torch.linspace(math.log(T), math.log(delta), K + 1, dtype=torch.float64))
    u[0], u[-1] = T, delta
    return u


def uniform(T: float, delta: float, K: int) -> Tensor:
    """Take equal steps."""
    _check(T, delta, K)
    u = torch.linspace(T, delta, K + 1, dtype=torch.float64)
    u[0], u[-1] = T, delta
    return u


def ddpm_linear(T: float, delta: float, K: int) -> Tensor:
    """Return the times of DDPM's linear betas, 1e-4 to 0.02 over 1000 levels (Ho et al. 2020)."""
    return _ddpm(np.linspace(1e-4, 0.02, 1000), T, delta, K)


def ddpm_cosine(T: float, delta: float, K: int) -> Tensor:
    """Return the times of the cosine schedule, betas clipped at 0.999 (Nichol & Dhariwal 2021)."""
    j = np.arange(1001) / 1000
    f = np.cos((j + 0.008) / 1.008 * np.pi / 2) ** 2
    return _ddpm(np.clip(1 - f[1:] / f[:-1], 0, 0.999), T, delta, K)


def _ddpm(betas: np.ndarray, T: float, delta: float, K: int) -> Tensor:
    """Return u(j) = -1/2 log alpha_bar_j from T to delta, equally spaced in j."""
    _check(T, delta, K)
    levels = np.concatenate([[0.0], -0.5 * np.cumsum(np.log1p(-betas))])
    if levels[-1] * (1 + 1e-9) < T:
        raise ValueError(f"T = {T} is above the schedule's range; at most {levels[-1]:.4f}")
    j = np.arange(len(levels))
    first, last = np.interp([T, delta], levels, j).tolist()
    u = np.interp(np.linspace(first, last, K + 1), j, levels)
    u[0], u[-1] = T, delta
    return torch.from_numpy(u)


PARTITIONS: dict[str, TimeGrid] = {
    "kappa_minimal": kappa_minimal,
    "half_half": half_half,
    "geometric": geometric,
    "uniform": uniform,
    "ddpm_linear": ddpm_linear,
    "ddpm_cosine": ddpm_cosine,
}


def check_times(u: Tensor, T: float, delta: float, K: int) -> None:
    """Refuse times that are not a partition as `TimeGrid` says.

    Raises
    ------
    ValueError
        The message says what is wrong.
    """
    if not isinstance(u, Tensor) or u.dtype != torch.float64 or u.shape != (K + 1,):
        got = f"{u.dtype} {list(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"it returns {got}, not float64 [{K + 1}], the K + 1 = {K + 1} times")
    if float(u[0]) != T or float(u[-1]) != delta or not bool((gammas(u) > 0).all()):
        raise ValueError(
            f"its times do not fall strictly from T = {T:g} to delta = {delta:g}: they go from "
            f"{float(u[0]):g} to {float(u[-1]):g}"
        )


def _check(T: float, delta: float, K: int) -> None:
    if not (0 < delta < 1 <= T and K >= 1):
        raise ValueError(f"need 0 < delta < 1 <= T and K >= 1; delta = {delta}, T = {T}, K = {K}")
