"""How much memory is really there: what the kernel would give, and what the cgroup still allows.

A container sees the whole machine in /proc/meminfo, but is killed at its cgroup's limit.  Memory
that the kernel can take back (the cgroup's inactive file cache) counts as free.
"""

from __future__ import annotations

import pathlib

import torch

__all__ = ["available_memory", "available_on_host"]


def available_memory(device: torch.device) -> int:
    """Bytes that this process could still take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_on_host(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))


def available_on_host(proc: pathlib.Path, cgroups: pathlib.Path) -> int:
    """The least of MemAvailable and what each cgroup above this process (v1 or v2) has left."""
    room = [_mem_available(proc / "meminfo")]
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            names, root = ("memory.max", "memory.current", "inactive_file"), cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = cgroups / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group == root or root in group.parents:
                room += _left_in(group, *names)
    return max(0, min(room))


def _mem_available(meminfo: pathlib.Path) -> int:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _left_in(
    group: pathlib.Path, limit_name: str, usage_name: str, reclaimable_name: str
) -> list[int]:
    """Bytes below the group's limit; nothing if it has none."""
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit():
        return []
    reclaimable = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == reclaimable_name:
            reclaimable = int(value)
    return [int(limit) - int(usage) + reclaimable]


def _read(path: pathlib.Path) -> str:
    """A file's text; empty if there is none, as on the root of a cgroup tree."""
    try:
        return path.read_text()
    except OSError:
        return ""
