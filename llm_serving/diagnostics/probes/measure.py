"""What does the transport reach on this machine, and is that what it should be?

One link to a peer process for each transport; on the first, arrays are brought over in every way.
A size that /dev/shm or the memory has no room for is left out, and a finding says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llm_serving.diagnostics.findings import Finding, megabytes
from llm_serving.diagnostics.probes.arrays import (
    WAYS,
    ArrayTiming,
    ScalarCosts,
    array_trips,
    scalar_costs,
    volume_trip,
)
from llm_serving.diagnostics.probes.echo_link import ECHO_PEER, EchoLink, Transport
from llm_serving.diagnostics.probes.round_trips import (
    MEMORY,
    NAMES,
    SIZES,
    channel_trips,
    copy_speed,
    memory_trips,
    raw_trip,
)
from llm_serving.diagnostics.probes.timings import Budget, Timing
from llm_serving.diagnostics.thresholds import THRESHOLDS, verdict_of
from llm_serving.errors import ServingError
from llm_serving.transport.frames import MAX_FRAME_BYTES

__all__ = ["FULL", "QUICK", "Measured", "Plan", "judge", "measure"]

_KB, _MB = 1024, 1024 * 1024
_HEAD_ROOM = 4096  # of a slot: its head, and rounding
_COPIES = 6  # of the largest array, in both processes
_GAIN_AT = 4 * _MB


@dataclass(frozen=True, slots=True)
class Plan:
    sizes: tuple[int, ...]
    array_sizes: tuple[int, ...]
    num_values: int  # that travel with 16 and with 32 bits
    budget: Budget  # of one figure


# The last array is what just fits into a frame.
FULL = Plan(SIZES, (64 * _KB, _MB, 15 * _MB), 4 * _MB, Budget(0.4))
QUICK = Plan((SIZES[0], SIZES[2], SIZES[4]), (64 * _KB, _MB), _MB, Budget(0.05, num_warm_up=1))


@dataclass(slots=True)
class Measured:
    round_trips: list[Timing] = field(default_factory=list)
    arrays: list[ArrayTiming] = field(default_factory=list)
    volumes: list[ArrayTiming] = field(default_factory=list)  # of 16 bits and of 32
    copy_gb_per_s: float | None = None
    copy_bytes: int = 0  # in one go
    scalars: ScalarCosts | None = None
    findings: list[Finding] = field(default_factory=list)  # what could not be measured


async def measure(
    plan: Plan,
    *,
    shm_bytes: int,
    memory_bytes: int,
    say: Callable[[str], None],
    command: Sequence[str] = ECHO_PEER,
) -> Measured:
    """Within what is free; what goes wrong is a finding, not an exception."""
    measured = Measured(scalars=scalar_costs())
    most = min((shm_bytes - 2 * _HEAD_ROOM) // 2, memory_bytes // _COPIES)
    sizes = [size for size in plan.sizes if size <= most]
    if left_out := [size for size in plan.sizes if size > most]:
        words = f"{', '.join(map(megabytes, left_out))}: not measured, for {megabytes(shm_bytes)} "
        words += f"of shared memory and {megabytes(memory_bytes)} of memory are free"
        measured.findings.append(Finding("sizes", "skipped", words))
    if not sizes:
        return measured
    transports: tuple[Transport, Transport] = ("tcp", "unix")
    for transport in transports:
        said: list[str] = []
        try:
            async with EchoLink.open(
                transport, sizes[-1] + _HEAD_ROOM, command=command, on_event=said.append
            ) as link:
                await _measure_link(link, plan, sizes, measured, say)
        except (ServingError, OSError) as exc:
            words = f"cannot be measured: {exc}"
            cure = "see the messages of the same transport above"
            trace = "\n".join(said)
            measured.findings.append(Finding(NAMES[transport], "broken", words, cure, trace=trace))
    return measured


async def _measure_link(
    link: EchoLink,
    plan: Plan,
    sizes: Sequence[int],
    measured: Measured,
    say: Callable[[str], None],
) -> None:
    name = NAMES[link.transport]
    say(f"{name}: frames there and back")
    measured.round_trips += await channel_trips(link, sizes, plan.budget)
    say(f"{name}: shared memory with a doorbell")
    measured.round_trips += await memory_trips(link, sizes, plan.budget)
    for size in sizes:
        if size >= MAX_FRAME_BYTES:
            say(f"{name}: {megabytes(size)} through a raw socket")
            measured.round_trips.append(await raw_trip(link, size, plan.budget))
    if link.transport == "tcp":
        say("arrays in messages and in shared memory")
        await _measure_arrays(link, plan, sizes[-1], measured)


async def _measure_arrays(link: EchoLink, plan: Plan, most: int, measured: Measured) -> None:
    for num_bytes in plan.array_sizes:
        if num_bytes <= most:
            measured.arrays += await array_trips(link, num_bytes, plan.budget)
    if 4 * plan.num_values <= most:
        for bits in (16, 32):
            trip = await volume_trip(link, plan.num_values, bits, plan.budget)
            measured.volumes.append(trip)
    measured.copy_bytes = most
    measured.copy_gb_per_s = await copy_speed(link, most, plan.budget)


def judge(measured: Measured) -> list[Finding]:
    """What the figures mean."""
    findings = [
        _ping(timing) for timing in measured.round_trips if _is_ping(timing, measured.round_trips)
    ]
    if measured.copy_gb_per_s is not None:
        findings.append(_copy(measured.copy_gb_per_s, measured.copy_bytes))
    findings += _gains(measured.round_trips)
    findings += [_arrays(measured.arrays)] if measured.arrays else []
    findings += [_scalars(measured.scalars)] if measured.scalars else []
    findings += [_volume(*measured.volumes)] if len(measured.volumes) == 2 else []
    return measured.findings + findings


def _is_ping(timing: Timing, timings: Sequence[Timing]) -> bool:
    smallest = min(other.num_bytes for other in timings)
    return timing.num_bytes == smallest and timing.way in NAMES.values()


def _ping(timing: Timing) -> Finding:
    verdicts = (verdict_of("ping p50", timing.p50_us), verdict_of("ping p99", timing.p99_us))
    is_slow = "slow" in verdicts
    cure = "end what else computes here, or give the server more cores; then measure again"
    return Finding(
        f"{timing.way}: round trip",
        "slow" if is_slow else "OK",
        f"p50 {timing.p50_us:.0f} us, p99 {timing.p99_us:.0f} us with {timing.num_bytes} bytes",
        cure if is_slow else "",
        {"p50_us": timing.p50_us, "p99_us": timing.p99_us},
    )


def _copy(gb_per_s: float, num_bytes: int) -> Finding:
    verdict = verdict_of("shared memory copy", gb_per_s)
    cure = THRESHOLDS["shared memory copy"].reason if verdict == "slow" else ""
    words = f"one core copies {megabytes(num_bytes)} into it at {gb_per_s:.1f} GB/s"
    return Finding("shared memory: copy", verdict, words, cure, {"gb_per_s": gb_per_s})


def _gains(timings: Sequence[Timing]) -> list[Finding]:
    """How many times faster than the socket itself, at a size that both can."""
    us = {timing.way: timing.p50_us for timing in timings if timing.num_bytes == _GAIN_AT}
    found = []
    for name in NAMES.values():
        if name not in us or MEMORY + name not in us:
            continue
        gain = us[name] / us[MEMORY + name]
        verdict = verdict_of("shared memory gain", gain)
        cure = THRESHOLDS["shared memory gain"].reason if verdict == "slow" else ""
        words = f"{gain:.1f} times as fast with {megabytes(_GAIN_AT)} as {name} alone"
        found.append(Finding(MEMORY + name, verdict, words, cure, {"gain": gain}))
    return found


def _arrays(arrays: Sequence[ArrayTiming]) -> Finding:
    size = max(array.num_bytes for array in arrays if array.way == WAYS[0])
    us = {array.way: array.total_us for array in arrays if array.num_bytes == size}
    numbers, in_bytes = us[WAYS[0]] / us[WAYS[2]], us[WAYS[1]] / us[WAYS[2]]
    words = (
        f"an array of {megabytes(size)} takes {us[WAYS[2]]:.0f} us in shared memory, "
        f"{in_bytes:.1f} times that as bytes in a message, {numbers:.0f} times as numbers"
    )
    verdict = verdict_of("shared memory gain", in_bytes)
    cure = THRESHOLDS["shared memory gain"].reason if verdict == "slow" else ""
    values = {"bytes_ratio": in_bytes, "numbers_ratio": numbers}
    return Finding("arrays in messages", verdict, words, cure, {**values})


def _scalars(costs: ScalarCosts) -> Finding:
    """Refused is right: a numpy scalar in a message is a conversion that somebody forgot."""
    words = (
        f"a thousand ints take {costs.ints_us:.0f} us; from an array {costs.tolist_us:.0f} us by "
        f"tolist(), {costs.one_by_one_us:.0f} us by int() for each"
    )
    values = {"ints_us": costs.ints_us, "tolist_us": costs.tolist_us}
    values |= {"one_by_one_us": costs.one_by_one_us}
    if costs.refusal is None:
        cure = "this msgspec encodes them: keep to the version in constraints.txt"
        return Finding("numpy scalars", "slow", f"not refused; {words}", cure, {**values})
    return Finding("numpy scalars", "OK", f"refused ({costs.refusal}); {words}", values={**values})


def _volume(half: ArrayTiming, full: ArrayTiming) -> Finding:
    ratio = full.total_us / half.total_us
    words = (
        f"{half.num_bytes // 2} values take {half.total_us:.0f} us with 16 bits, "
        f"{full.total_us:.0f} us with 32: {ratio:.1f} times"
    )
    return Finding("bf16 against float32", "OK", words, values={"ratio": ratio})
