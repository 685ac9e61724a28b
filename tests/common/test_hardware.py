"""What a process may use of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fed_diffusion.common.hardware import control_groups, cpu_quotas, usable_cores


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "cgroup", folder / "groups"


QUOTAS = {
    "version 2, the group's own": (
        {"groups": "0::/a\n", "cgroup/a/cpu.max": "150000 100000\n"},
        [1.5],
    ),
    "version 2, a parent's too": (
        {
            "groups": "0::/a/b\n",
            "cgroup/a/b/cpu.max": "max 100000\n",
            "cgroup/a/cpu.max": "50000 100000\n",
            "cgroup/cpu.max": "800000 100000\n",
        },
        [0.5, 8.0],
    ),
    "version 2, a container that sees its group as the root": (
        {"groups": "0::/docker/0123\n", "cgroup/cpu.max": "200000 100000\n"},
        [2.0],
    ),
    "version 1, a parent's": (
        {
            "groups": "4:memory:/m\n3:cpu,cpuacct:/a/b\n1:name=systemd:/s\n0::/\n",
            "cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            "cgroup/cpu/a/cpu.cfs_quota_us": "250000\n",
            "cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        [2.5],
    ),
    "no quota": ({"groups": "0::/a\n", "cgroup/a/cpu.max": "max 100000\n"}, []),
    "no control groups": ({}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quotas_of_all_control_groups_around_a_process_are_found(case, tmp_path):
    files, expected = QUOTAS[case]
    assert list(cpu_quotas(*tree(tmp_path, files))) == expected


def test_groups_of_other_controllers_do_not_count(tmp_path):
    root, groups = tree(tmp_path, {"groups": "4:memory:/m\n3:cpuset:/c\n2:cpuacct:/d\n"})
    assert list(control_groups("cpu", root, groups)) == []
    assert list(control_groups("memory", root, groups)) == [
        (root / "memory" / "m", 1),
        (root / "memory", 1),
    ]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_affinity_is_minded():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= usable_cores() <= len(before)


def _set_quota(group: Path, cores: float) -> None:
    """A quota on a control group, of the version that this system has."""
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_quota_us").write_text(str(int(cores * 100_000)))
    else:
        (group / "cpu.max").write_text(f"{int(cores * 100_000)} 100000")


@pytest.mark.parametrize(("cores", "expected"), [(0.3, 1), (1.0, 1), (1.2, 2)])
def test_a_real_quota_is_minded_and_rounded_up(cores, expected):
    parents = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    group = next((p for p in parents if p.is_dir()), parents[0]) / f"fed-diffusion-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        try:
            _set_quota(group, cores)
        except OSError as error:
            pytest.skip(f"quotas cannot be set here: {error}")
        script = (
            f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
            "from fed_diffusion.common.hardware import usable_cores; print(usable_cores())"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == min(expected, usable_cores())
    finally:
        group.rmdir()
