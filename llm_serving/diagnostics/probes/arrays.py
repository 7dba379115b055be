"""What does it cost to bring an array to another process: in a message, or in shared memory?

    msgpack, numbers   array.tolist() in a message, and an array made of it again
    msgpack, bytes     array.tobytes() in a message, and a view of what came
    shared memory      copied into an arena, a frame with its reference, a view at the other end

One way.  The peer's stamps are of the same clock (CLOCK_MONOTONIC is the machine's), so that each
part is known: encode or write, on the way, decode or read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.probes.echo_link import EchoLink
from llm_serving.diagnostics.probes.echo_words import Request, Seen, Take, TakeNumbers, TakeTensor
from llm_serving.diagnostics.probes.timings import Budget, nearest_rank, timed
from llm_serving.errors import ChannelError
from llm_serving.transport import frames

__all__ = ["WAYS", "ArrayTiming", "ScalarCosts", "array_trips", "scalar_costs", "volume_trip"]

Array = npt.NDArray[Any]

WAYS = ("msgpack, numbers", "msgpack, bytes", "shared memory")
_ANSWER_S = 20.0
_BYTES_OF_A_NUMBER = 9  # msgpack: a tag and a float64


@dataclass(frozen=True, slots=True)
class ArrayTiming:
    """Median microseconds of each part."""

    way: str
    num_bytes: int
    encode_us: float
    transit_us: float
    decode_us: float

    @property
    def total_us(self) -> float:
        return self.encode_us + self.transit_us + self.decode_us


@dataclass(frozen=True, slots=True)
class ScalarCosts:
    """Microseconds to put a thousand integers into a message."""

    refusal: str | None  # what msgpack says to a numpy scalar; None: it took it
    ints_us: float
    tolist_us: float  # array.tolist() first
    one_by_one_us: float  # int(x) for every numpy scalar first


async def array_trips(link: EchoLink, num_bytes: int, budget: Budget) -> list[ArrayTiming]:
    """The same float32 array by every way that a frame has room for."""
    array = np.linspace(0, 1, num_bytes // 4, dtype=np.float32)
    return [
        await _one_way(link, way, array, budget)
        for way in WAYS
        if way != WAYS[0] or len(array) * _BYTES_OF_A_NUMBER < frames.MAX_FRAME_BYTES
    ]


async def volume_trip(link: EchoLink, num_values: int, bits: int, budget: Budget) -> ArrayTiming:
    """So many values in shared memory, of 16 bits (bfloat16, as it travels) or of 32."""
    array = np.ones(num_values, np.uint16 if bits == 16 else np.float32)
    return await _one_way(link, WAYS[2], array, budget)


def scalar_costs(num_rounds: int = 50) -> ScalarCosts:
    """Numpy scalars slip into messages as results of sums and indexing."""
    array = np.arange(1000, dtype=np.int64)
    ints, scalars = array.tolist(), list(array)
    encode = msgspec.msgpack.encode
    try:
        encode({"token_id": array[7]})
        refusal = None
    except TypeError as exc:
        refusal = str(exc)
    return ScalarCosts(
        refusal,
        _median_us(lambda: encode(ints), num_rounds),
        _median_us(lambda: encode(array.tolist()), num_rounds),
        _median_us(lambda: encode([int(x) for x in scalars]), num_rounds),
    )


async def _one_way(link: EchoLink, way: str, array: Array, budget: Budget) -> ArrayTiming:
    parts: list[tuple[int, int, int]] = []

    async def once() -> None:
        parts.append(await _send(link, way, array))

    await timed(once, budget)
    kept = parts[budget.num_warm_up :]
    encode, transit, decode = (
        nearest_rank([part[i] / 1e3 for part in kept], 0.5) for i in range(3)
    )
    return ArrayTiming(way, array.nbytes, encode, transit, decode)


async def _send(link: EchoLink, way: str, array: Array) -> tuple[int, int, int]:
    """Nanoseconds of encoding, of the way, of decoding."""
    slot = link.inputs.begin() if way == WAYS[2] else None
    began_ns = time.monotonic_ns()
    request = _request(link, way, array, slot)
    frame = frames.encode(request)
    encoded_ns = time.monotonic_ns()
    link.channel.post(frame)
    seen = await link.channel.recv(_ANSWER_S)
    if slot is not None:
        link.inputs.release(slot)
    right = float(array[0]) + float(array[-1])
    if not isinstance(seen, Seen) or abs(seen.total - right) > 1e-6:
        raise ChannelError(f"the array did not arrive: {seen!r:.100}")
    await asyncio.sleep(0)
    return encoded_ns - began_ns, seen.received_ns - encoded_ns, seen.taken_ns - seen.received_ns


def _request(link: EchoLink, way: str, array: Array, slot: int | None) -> Request:
    if slot is not None:
        return TakeTensor(link.inputs.write(slot, array))
    return TakeNumbers(array.tolist()) if way == WAYS[0] else Take(array.tobytes())


def _median_us(call: Callable[[], object], num_rounds: int) -> float:
    spent = []
    for _ in range(num_rounds):
        began = time.perf_counter()
        call()
        spent.append((time.perf_counter() - began) * 1e6)
    return nearest_rank(spent, 0.5)
