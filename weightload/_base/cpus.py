"""How many CPUs this process may use: the affinity mask and the cgroup's quota, not the machine's count."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from weightload._base.handlers import pass_on


def usable_cpus() -> int:
    """CPUs the process may use, at least 1. A quota of 1.5 CPUs counts as 2; a change of it is not noticed."""
    try:
        count = len(os.sched_getaffinity(0))
    # A sandbox that does not allow the question; EINVAL Python takes for too small a mask, which it doubles in vain.
    except (OSError, OverflowError, MemoryError) as failed:
        pass_on(failed)
        count = os.cpu_count() or 1
    quota = _own_quota()
    return max(1, count if quota is None else min(count, -int(-quota // 1)))


@functools.cache
def _own_quota() -> float | None:
    """Asked once: a dozen small files take 0.1 ms, which every load would spend several times."""
    return cgroup_cpu_quota()


def cgroup_cpu_quota(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """The least CPU quota, in CPUs, of the process's cgroup and those above it; None without one.

    Reads both versions: ``cpu.max`` ("quota period" or "max period", in microseconds) of version 2, and
    ``cpu.cfs_quota_us`` / ``cpu.cfs_period_us`` (quota -1: none) of version 1 (Documentation/admin-guide of Linux).
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError as failed:
        pass_on(failed)
        return None
    quotas: list[float] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            quotas += _quotas(mount, path, _version2)
            quotas += _quotas(mount / "unified", path, _version2)
        elif "cpu" in controllers.split(","):
            quotas += _quotas(mount / "cpu", path, _version1)
            quotas += _quotas(mount / "cpu,cpuacct", path, _version1)
    return min(quotas, default=None)


def _quotas(root: Path, path: str, read: object) -> list[float]:
    """Quotas of the group `path` below `root` and of every group above it, up to the root itself.

    In a container the path is often that of the host while only the container's own group is mounted, at the root:
    groups that are not there are passed over.
    """
    assert callable(read)
    folder = root.joinpath(*[part for part in path.split("/") if part not in ("", "..")])
    found = []
    for group in [folder, *folder.parents]:
        quota = read(group)
        if quota is not None:
            found.append(quota)
        if group == root:
            break
    return found


def _version2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError) as failed:
        pass_on(failed)
        return None


def _version1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError) as failed:
        pass_on(failed)
        return None
