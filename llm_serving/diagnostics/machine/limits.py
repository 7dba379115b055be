"""How much may this process take: files, processes, locked memory, and what its cgroup allows?"""

from __future__ import annotations

import pathlib
import resource
from collections.abc import Callable, Iterator

from llm_serving.diagnostics.findings import Finding, Number, megabytes
from llm_serving.diagnostics.places import Places, read
from llm_serving.diagnostics.thresholds import THRESHOLDS, verdict_of

__all__ = ["check_cgroup_memory", "check_cores", "check_limits"]

GetLimit = Callable[[int], tuple[int, int]]

_FEWEST_FILES = 128  # libraries, sockets and pipes of a server without a single client
_FEWEST_PROCESSES = 32
_GB = 1024**3


def check_limits(get_limit: GetLimit = resource.getrlimit) -> list[Finding]:
    files, processes, locked = (
        get_limit(kind)[0]
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)
    )
    return [
        _check("open files", files, _FEWEST_FILES, "ulimit -n"),
        _check("processes", processes, _FEWEST_PROCESSES, "ulimit -u"),
        Finding(
            "locked memory",
            "OK",
            f"{'no limit' if locked < 0 else megabytes(locked)} may be locked; nothing needs to be",
            values={"limit_bytes": locked},
        ),
    ]


def check_cores(num_usable: int, num_cores: int) -> Finding:
    """`num_usable` is what affinity and cgroup leave of the machine's."""
    verdict = verdict_of("cores", num_usable)
    cure = "give the server two processors (docker run --cpus)" if verdict == "slow" else ""
    words = f"{num_usable} of {num_cores} may be used; the agent takes as many threads"
    return Finding("cores", verdict, words, cure, {"usable": num_usable, "cores": num_cores})


def check_cgroup_memory(places: Places) -> Finding:
    """The tightest of the groups above this process, v1 or v2."""
    limits = list(_memory_limits(places))
    if not limits:
        return Finding("cgroup memory", "OK", "no cgroup limits the memory, or none is visible")
    left, limit = min(limits)
    verdict = verdict_of("free memory", left / _GB)
    cure = "raise the container's memory (docker run --memory)" if verdict == "slow" else ""
    words = f"{megabytes(max(0, left))} of {megabytes(limit)} are left to this container"
    return Finding(
        "cgroup memory", verdict, words, cure, {"left_bytes": left, "limit_bytes": limit}
    )


def _check(item: str, limit: int, fewest: int, command: str) -> Finding:
    values: dict[str, Number] = {"limit": limit}
    if limit < 0:
        return Finding(item, "OK", "no limit", values=values)
    words, cure = f"at most {limit}", f"{command} {THRESHOLDS[item].limit:g}, before the start"
    if limit < fewest:
        return Finding(item, "broken", f"{words}: a start needs {fewest}", cure, values)
    verdict = verdict_of(item, limit)
    return Finding(item, verdict, words, cure if verdict == "slow" else "", values)


def _memory_limits(places: Places) -> Iterator[tuple[int, int]]:
    """Bytes left and bytes allowed, of every group that has a limit."""
    for line in (read(places.proc / "self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root, names = places.cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = places.cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group == root or root in group.parents:
                yield from _limit_of(group, *names)


def _limit_of(
    group: pathlib.Path, limit: str, usage: str, cached: str
) -> Iterator[tuple[int, int]]:
    """Its file cache counts as left: the kernel takes it back."""
    allowed, used = (read(group / name) or "" for name in (limit, usage))
    if not allowed.strip().isdigit() or not used.strip().isdigit():
        return
    if int(allowed) > 1 << 60:  # how v1 says "none"
        return
    pairs = (line.split() for line in (read(group / "memory.stat") or "").splitlines())
    free = sum(int(pair[1]) for pair in pairs if pair[:1] == [cached])
    yield int(allowed) - int(used) + free, int(allowed)
