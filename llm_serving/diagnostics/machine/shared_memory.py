"""Is /dev/shm there, large enough and free of what dead servers left?"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from llm_serving.diagnostics.findings import Finding, Number, megabytes
from llm_serving.diagnostics.machine.leftovers import Leftover, find_leftovers
from llm_serving.diagnostics.places import Places, read

__all__ = ["check_room", "check_segments", "free_bytes", "room_needed"]

_MOST_NAMED = 3
_PATTERN = "llm-serving-*-*-*"


def room_needed(input_bytes: int, result_bytes: int, num_slots: int, num_ranks: int) -> int:
    """What the segments of one server take, to the page."""
    page = 4096
    sizes = [input_bytes * num_slots, *[result_bytes * num_slots, page] * num_ranks]
    return sum(-(-size // page) * page for size in sizes)


def check_room(places: Places, needed: int, why: str, *, must_fit: bool = True) -> Finding:
    """`needed` bytes for what `why` names; nothing is written."""
    try:
        found = os.statvfs(places.shm)
        mode = places.shm.stat().st_mode
    except OSError as exc:
        cure = f"mount a tmpfs at {places.shm}; every server keeps its arrays there"
        return Finding("/dev/shm", "broken", f"{places.shm}: {exc.strerror}", cure)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    kind = _file_system(places)
    values: dict[str, Number] = {
        "size_bytes": size,
        "free_bytes": free,
        "needed_bytes": needed,
        "file_system": kind,
    }
    words = f"{kind}, {megabytes(free)} of {megabytes(size)} free"
    if not stat.S_ISDIR(mode) or not os.access(places.shm, os.W_OK | os.X_OK):
        cure = f"make it writable for this user (mode 1777): chmod 1777 {places.shm}"
        return Finding("/dev/shm", "broken", f"{words}, but not writable", cure, values)
    words += f"; {why} takes {megabytes(needed)}"
    if free < needed and must_fit:
        cure = "make it larger (docker run --shm-size), or lower max_num_seqs or max_model_len"
        return Finding("/dev/shm", "broken", f"{words}: too little", cure, values)
    if kind not in ("tmpfs", "unknown"):
        cure = f"mount a tmpfs at {places.shm}: arrays go to a disk now"
        return Finding("/dev/shm", "slow", words, cure, values)
    return Finding("/dev/shm", "OK", words, values=values)


def check_segments(places: Places) -> Finding:
    """Which servers' segments lie there; those of dead ones are leaked memory."""
    found = find_leftovers(places.shm, _PATTERN, places)
    alive, orphans, closed = (
        [segment for segment in found if segment.state == state]
        for state in ("alive", "orphan", "not permitted")
    )
    words = [_by_owner(alive)] if alive else []
    words += [f"left by dead processes: {_listed(orphans)}"] if orphans else []
    words += [f"of other users, not ours to look at: {_listed(closed)}"] if closed else []
    values: dict[str, Number] = {
        "num_alive": len(alive),
        "num_orphans": len(orphans),
        "orphan_bytes": sum(segment.num_bytes for segment in orphans),
        "orphans": " ".join(segment.path.name for segment in orphans),
        "num_not_permitted": len(closed),
    }
    if orphans:
        cure = "the next start of llm-serving sweeps them, and says so; until then they hold memory"
        return Finding("segments", "broken", "; ".join(words), cure, values)
    return Finding("segments", "OK", "; ".join(words) or "none, and none is leaked", values=values)


def free_bytes(places: Places) -> int:
    """How much could be written there; 0 if it cannot be told."""
    try:
        found = os.statvfs(places.shm)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _by_owner(segments: Sequence[Leftover]) -> str:
    groups: dict[int, list[Leftover]] = {}
    for segment in segments:
        groups.setdefault(segment.holder or segment.made_by, []).append(segment)
    return ", ".join(
        f"{len(group)} in use by pid {pid} ({megabytes(sum(s.num_bytes for s in group))})"
        for pid, group in groups.items()
    )


def _listed(segments: Sequence[Leftover]) -> str:
    num_bytes = megabytes(sum(segment.num_bytes for segment in segments))
    named = ", ".join(segment.words for segment in segments[:_MOST_NAMED])
    more = f" and {len(segments) - _MOST_NAMED} more" if len(segments) > _MOST_NAMED else ""
    return f"{num_bytes} in {named}{more}"


def _file_system(places: Places) -> str:
    """Of the longest mount point that the folder lies in."""
    best, kind = "", "unknown"
    for line in (read(places.proc / "self/mounts") or "").splitlines():
        _, point, name, *_ = line.split()
        inside = (
            point == "/"
            or places.shm == (here := places.shm.__class__(point))
            or (here in places.shm.parents)
        )
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind
