"""From a machine's resources to a keep ratio: what the machine allows, what a sub-network takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fed_diffusion.common.hardware import control_groups

MARGIN = 1.15
"""Predictions are multiplied by this, since they are extrapolated from smaller networks."""
TRAINING_SHARE = 0.8
"""The share of the round's deadline for training; the rest is for messages and the server."""
BYTES_PER_PARAMETER = 20
"""The bytes of five float32: value, gradient, two moments of Adam, and the value on arrival."""
LIMITS = ("none", "memory", "time", "memory and time")
MB = 1e6


class BudgetError(RuntimeError):
    """Not even the smallest sub-network of the ladder fits this machine."""


@dataclass(frozen=True)
class Demand:
    """What a sub-network needs by its shapes alone.

    Attributes
    ----------
    parameters
        Bytes of values, gradients, moments and of the values as they arrived.
    activations
        Bytes that a step keeps for its backward pass.
    work
        Multiply-adds of a step.
    """

    parameters: float
    activations: float
    work: float

    @property
    def memory(self) -> float:
        return self.parameters + self.activations


@dataclass(frozen=True)
class Probe:
    """What a few steps took: bytes above the idle process at the peak, and seconds of one step."""

    memory: float
    seconds: float


@dataclass(frozen=True)
class Budget:
    """The keep ratio that a machine can carry, and why it is not larger.

    Attributes
    ----------
    keep
        The largest ratio of the ladder that fits.
    limit
        What the next larger ratio would exceed: none, memory, time, memory and time.
    memory, memory_cap
        Predicted peak and what may be used, bytes above the idle process.
    seconds, seconds_cap
        Predicted time of the local steps of a round, and what the deadline leaves for them.
    """

    keep: float
    limit: str
    memory: float
    memory_cap: float
    seconds: float
    seconds_cap: float

    def to_metrics(self) -> dict[str, int | float]:
        """Return the budget as numbers, as a node's answer carries it."""
        return {
            "keep": self.keep,
            "budget.limit": LIMITS.index(self.limit),
            "budget.memory_mb": self.memory / MB,
            "budget.memory_cap_mb": self.memory_cap / MB,
            "budget.seconds": self.seconds,
            "budget.seconds_cap": self.seconds_cap,
        }


def choose(
    demands: Mapping[float, Demand],
    probes: Mapping[float, Probe],
    memory_cap: float,
    steps: int,
    deadline_s: float,
) -> Budget:
    """Return the largest ratio whose predicted peak and time fit.

    Memory and time are linear in the demand's bytes and multiply-adds, through the probes of the
    two smallest ratios (proportional where there is one; the demand alone where there is none).

    Parameters
    ----------
    demands
        For every ratio of the ladder.
    probes
        For its two smallest ratios, as far as there was room to try them.
    memory_cap
        Bytes above the idle process that may be used.

    Raises
    ------
    BudgetError
        No ratio fits; the message has the figures.
    """
    seconds_cap = TRAINING_SHARE * deadline_s
    a, b = _line([(demands[keep].work, probe.seconds) for keep, probe in probes.items()])
    limit = "none"
    for keep in sorted(demands, reverse=True):
        peak = expected_memory(demands, probes, keep)
        took = MARGIN * steps * (a + b * demands[keep].work)
        over = {"memory": peak > memory_cap, "time": took > seconds_cap}
        if not any(over.values()):
            return Budget(keep, limit, peak, memory_cap, took, seconds_cap)
        limit = " and ".join(name for name, exceeded in over.items() if exceeded)
    raise BudgetError(
        f"not even keep = {min(demands):g} fits here: it needs {peak / MB:.0f} MB above the "
        f"idle process ({memory_cap / MB:.0f} MB may be used) and {took:.1f} s a round (the "
        f"deadline leaves {seconds_cap:.1f} s). Give it more memory, a longer round.deadline_s, a "
        "smaller local.batch, or pruning.ladder a smaller last ratio."
    )


def expected_memory(
    demands: Mapping[float, Demand], probes: Mapping[float, Probe], keep: float
) -> float:
    """Return the predicted peak of a ratio, in bytes above the idle process.

    The result is never less than the demand: a probe may have found memory that the process held
    before.
    """
    a, b = _line([(demands[k].memory, probe.memory) for k, probe in probes.items()])
    return max(MARGIN * (a + b * demands[keep].memory), demands[keep].memory)


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return a and b of y = a + b x through the points, neither below 0; both 0 without points."""
    if not points:
        return 0.0, 0.0
    (x0, y0), (x1, y1) = min(points), max(points)
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if slope <= 0 or y0 - slope * x0 < 0:  # proportional, by the larger of the two rates
        return 0.0, max(y / x for x, y in points)
    return y0 - slope * x0, slope


def memory_allowed(stated_mb: float | None = None) -> float:
    """Return the bytes that this process may use beyond what it uses now.

    This is the least of the stated cap on its resident memory, the limits of its control groups,
    its limits on data and address space, and the machine's available memory.
    """
    process = psutil.Process()
    used = process.memory_info()
    allowed = [float(psutil.virtual_memory().available)]
    if stated_mb is not None:
        allowed.append(stated_mb * MB - used.rss)
    allowed += [limit - now for limit, now in _process_limits(used)]
    allowed += [limit - now for limit, now in _memory_limits()]
    return max(min(allowed), 0.0)


def _process_limits(used: object) -> Iterator[tuple[float, float]]:
    """Yield (limit, used) of the process's limits, where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, field in ((resource.RLIMIT_AS, "vms"), (resource.RLIMIT_DATA, "data")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and hasattr(used, field):
            yield float(soft), float(getattr(used, field))


def _memory_limits() -> Iterator[tuple[float, float]]:
    """Yield (limit, used) of every control group of this process, version 1 or 2."""
    for folder, version in control_groups("memory"):
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, now = (_number(folder / name) for name in names)
        if limit is not None and now is not None:
            yield limit, now - _reclaimable(folder / "memory.stat")


def _number(path: Path) -> float | None:
    try:
        text = path.read_text().strip()
    except OSError:  # no such control group here, as inside a container
        return None
    value = math.inf if text == "max" else float(text)
    return value if value < 2**60 else None  # version 1 writes a huge number for "no limit"


def _reclaimable(path: Path) -> float:
    """Return the file pages that the kernel gives back before it calls memory short."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0.0
    return float(fields.get("inactive_file", 0)) + float(fields.get("active_file", 0))
