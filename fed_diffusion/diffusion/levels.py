"""The noise levels of a schedule that counts them, j = 0, 1, ..., as times of ours.

Level j of such a schedule is X = sqrt(alpha_bar_j) X_0 + sqrt(1 - alpha_bar_j) eps, which is X_u of
the process (1) at u_j = -1/2 log alpha_bar_j. So any time between the first and the last level is a
real-valued level.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times_of(alpha_bar: Tensor) -> Tensor:
    """u_j = -1/2 log alpha_bar_j, float64 [J]; a last level without any signal is left out.

    Raises
    ------
    ValueError
        alpha_bar does not fall strictly from below 1.
    """
    bar = alpha_bar.detach().to("cpu", torch.float64)
    if len(bar) and float(bar[-1]) == 0:
        bar = bar[:-1]
    falls = bar.dim() == 1 and len(bar) > 1 and bool((bar[1:] < bar[:-1]).all())
    if not falls or not 0 < float(bar[-1]) < float(bar[0]) < 1:
        raise ValueError("its alpha_bar does not fall strictly from below 1 to above 0")
    return -0.5 * torch.log(bar)


def level_of(u: Tensor, levels: Tensor) -> Tensor:
    """The real-valued level j of the times u: j exactly at u_j, and linear in log(sigma / alpha).

    Times beyond the first and the last level are continued from the nearest two.

    Parameters
    ----------
    u
        Times [n], float64.
    levels
        u_j, float64 [J], as `times_of` gives them.
    """
    # what searchsorted gives, but in operations that ONNX has, too
    above = (levels <= u[:, None]).sum(1).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    part = (_log_ratio(u) - _log_ratio(low)) / (_log_ratio(high) - _log_ratio(low))
    return above - 1 + part


def _log_ratio(u: Tensor) -> Tensor:
    """log(sigma / alpha)."""
    return 0.5 * torch.log(torch.expm1(2 * u))
