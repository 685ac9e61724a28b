"""What this process may use of its machine, by the system's own limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may keep busy.

    The number is the smaller of the cores that the process may run on and the CPU time that its
    control groups and their parents have a quota of, rounded up.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, cpu_quotas())]))


def cpu_quotas(root: Path = ROOT, groups: Path = GROUPS) -> Iterator[float]:
    """Yield the quota of every control group around this process, in cores."""
    for folder, version in control_groups("cpu", root, groups):
        if version == 2:
            quota, period, *_ = *_words(folder / "cpu.max"), "", ""
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ("".join(_words(folder / name)) for name in names)
        # "max" in version 2 and -1 in version 1 mean that there is none
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def control_groups(
    controller: str, root: Path = ROOT, groups: Path = GROUPS
) -> Iterator[tuple[Path, int]]:
    """Return the folders of the control groups that limit this process, and their version, 1 or 2.

    Each group comes before its parents. A folder need not exist: a container may see its own group
    as the root, and the names of the groups outside.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        here = base / path.lstrip("/")
        while here == base or base in here.parents:
            yield here, 1 if controllers else 2
            here = here.parent


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
