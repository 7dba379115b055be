"""Is this machine fit to serve: its packages, its processor, its memory, its clock, its load?"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from llm_serving.diagnostics.findings import Finding, Number, megabytes
from llm_serving.diagnostics.places import Places, read
from llm_serving.diagnostics.thresholds import verdict_of

__all__ = ["check_clock", "check_load", "check_memory", "check_processor", "check_versions"]

_PACKAGES = ("llm-serving", "torch", "numpy", "msgspec")
_VECTORS = ("avx2", "asimd")  # of x86 and of ARM: what CPU kernels cannot do without
_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_KB, _GB = 1024, 1024**3
_NUM_CLOCK_CALLS = 20_000


def check_versions(find: Callable[[str], str] = version) -> Finding:
    """Nothing is imported: torch alone would take a second."""
    found: dict[str, Number] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = find(package)
        except PackageNotFoundError:
            found[package] = None
    words = ", ".join(f"{name} {value or 'missing'}" for name, value in found.items())
    missing = [name for name in ("torch", "numpy", "msgspec") if found[name] is None]
    if missing:
        cure = f"install {' and '.join(missing)} into the environment of {sys.executable}"
        return Finding("versions", "broken", words, cure, found)
    return Finding("versions", "OK", words, values=found)


def check_processor(places: Places) -> Finding:
    text = read(places.proc / "cpuinfo")
    if text is None:
        return Finding("processor", "skipped", f"{places.proc / 'cpuinfo'} cannot be read")
    lines = [line.partition(":") for line in text.splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    bf16, int8 = _those(_BF16, flags), _those(_INT8, flags)
    words = f"{name}; bf16 instructions: {bf16 or 'none'}; int8 dot products: {int8 or 'none'}"
    values: dict[str, Number] = {"name": name, "bf16": bf16, "int8": int8}
    if not _those(_VECTORS, flags):
        cure = "neither AVX2 nor NEON: serve on another machine, every step is slow here"
        return Finding("processor", "slow", words, cure, values)
    if not bf16:
        words += "; models are computed in float32, twice the bytes of bf16"
    return Finding("processor", "OK", words, values=values)


def check_memory(places: Places) -> Finding:
    """What the kernel would give; what the cgroup allows is a check of its own."""
    text = read(places.proc / "meminfo") or ""
    fields = {name: rest.split() for name, _, rest in map(_parted, text.splitlines())}
    if "MemAvailable" not in fields or "MemTotal" not in fields:
        return Finding("memory", "skipped", f"{places.proc / 'meminfo'} does not tell")
    free, total = (int(fields[name][0]) * _KB for name in ("MemAvailable", "MemTotal"))
    verdict = verdict_of("free memory", free / _GB)
    cure = "end what is not needed, or set kv_cache.num_blocks low" if verdict == "slow" else ""
    words = f"{megabytes(free)} of {megabytes(total)} are free"
    return Finding("memory", verdict, words, cure, {"free_bytes": free, "total_bytes": total})


def check_load(places: Places, num_cores: int) -> Finding:
    """Before anything of ours computes: a busy machine explains most that is slow."""
    text = read(places.proc / "loadavg")
    if text is None:
        return Finding("load", "skipped", f"{places.proc / 'loadavg'} cannot be read")
    load = float(text.split()[0])
    verdict = verdict_of("load", load / num_cores)
    cure = "the figures below are those of a busy machine; measure again when it is idle"
    words = f"{load:g} processes wanted to run in the last minute, on {num_cores} cores"
    return Finding(
        "load",
        verdict,
        words,
        cure if verdict == "slow" else "",
        {"load": load, "cores": num_cores},
    )


def check_clock(
    places: Places,
    *,
    resolution: Callable[[int], float] = time.clock_getres,
    cost_ns: Callable[[], float] | None = None,
) -> Finding:
    """CLOCK_MONOTONIC, the clock of every stamp."""
    resolution_ns = resolution(time.CLOCK_MONOTONIC) * 1e9
    call_ns = (cost_ns or _cost_ns)()
    source = (read(places.clocks / "current_clocksource") or "not told").strip()
    slow = "slow" in (
        verdict_of("clock resolution", resolution_ns),
        verdict_of("clock call", call_ns),
    )
    cure = "boot with a faster clock source (tsc, kvm-clock); stages of a step are not exact here"
    return Finding(
        "clock",
        "slow" if slow else "OK",
        f"CLOCK_MONOTONIC: resolution {resolution_ns:.0f} ns, a call takes {call_ns:.0f} ns, "
        f"source {source}",
        cure if slow else "",
        {"resolution_ns": resolution_ns, "call_ns": call_ns, "source": source},
    )


def _cost_ns() -> float:
    began = time.monotonic_ns()
    for _ in range(_NUM_CLOCK_CALLS):
        time.monotonic_ns()
    return (time.monotonic_ns() - began) / _NUM_CLOCK_CALLS


def _those(names: tuple[str, ...], flags: set[str]) -> str:
    return " ".join(name for name in names if name in flags)


def _parted(line: str) -> tuple[str, str, str]:
    return line.partition(":")
