"""How many processors may this process really use: its affinity, and the quota of its cgroup.

A container with two processors' worth of time still sees all of the machine's, and threads that
have no processor only disturb each other.
"""

from __future__ import annotations

import math
import os
import pathlib

__all__ = ["num_processors"]


def num_processors(proc: pathlib.Path, cgroups: pathlib.Path) -> int:
    """At least 1.  `proc` and `cgroups` are /proc and /sys/fs/cgroup; v2 and v1 are understood."""
    counts = [len(os.sched_getaffinity(0))]
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        is_v2 = hierarchy == "0"
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        root = cgroups if is_v2 else cgroups / "cpu"
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group == root or root in group.parents:
                counts += _quota(group)
    return max(1, min(counts))


def _quota(group: pathlib.Path) -> list[int]:
    """Processors' worth of time that a group may use; nothing if it has no limit."""
    numbers = _read(group / "cpu.max").split()
    if not numbers:
        numbers = [*map(_read, (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"))]
    numbers = [number.strip() for number in numbers]
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        return []
    return [math.ceil(int(numbers[0]) / int(numbers[1]))]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
