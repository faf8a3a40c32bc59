"""How many cores a container or a job may use."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Return how many cores this process may keep busy, at least 1."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_limit() or float("inf"))))


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return how many cores' time this process may use; None if nothing limits it.

    A limit of CPU time (``docker run --cpus 2``) hides no core: libraries start a thread for each
    core of the machine, and the threads wait for each other.

    Args:
        root: what holds ``proc`` and ``sys``.
    """
    limits: list[float] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            limits += _limits(root / "sys/fs/cgroup", own, "cpu.max")
        elif "cpu" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup" / controllers, own, "cpu.cfs_quota_us")
            limits += _limits(root / "sys/fs/cgroup/cpu", own, "cpu.cfs_quota_us")
    return min(limits, default=None)


def _limits(mounted: Path, own: str, name: str) -> list[float]:
    """Return the limits of a group and of those that it belongs to."""
    found = []
    group = mounted / own.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mounted):
            break
        try:
            quota, *period = (folder / name).read_text().split()
            if not period:
                period = [(folder / "cpu.cfs_period_us").read_text()]
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period[0]))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # not all groups have the file
    return found
