"""What estimates of time are made of: timed calls, and jobs shared out to workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fed_diffusion.build import Setup

SIDE_BY_SIDE = 1.1
"""The factor by which workers that share memory and caches are slower than one alone."""
TIMED_S = 1.5
"""The seconds that timed calls of one kind may take, beyond two calls."""


def took(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what an action returns, and the seconds that it takes."""
    began = time.perf_counter()
    found = action()
    return found, time.perf_counter() - began


def makespan(jobs: Sequence[float], processes: int) -> float:
    """Return when the last of these jobs ends that so many processes take in turn."""
    ends = [0.0] * max(1, processes)
    for job in jobs:
        first = min(range(len(ends)), key=ends.__getitem__)
        ends[first] += job
    return max(ends)


def multiply_adds(setup: Setup, network: torch.nn.Module) -> float:
    """Return the multiply-adds of a network for one image, forwards."""
    device = next(network.parameters()).device
    images = torch.zeros((1, *setup.shape), device=device)
    u = torch.ones(1, dtype=torch.float64, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device) if setup.classes else None
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        network(images, u, labels)
    return flops.get_total_flops() / 2
