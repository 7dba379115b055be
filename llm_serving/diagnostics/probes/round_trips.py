"""How fast do bytes go to another process of this machine and back?

    channel          our frame with the bytes in it, over TCP loopback or a Unix socket
    shared memory    the bytes in an arena; the doorbell is our frame with their reference
    raw socket       the bytes alone, for more than a frame may hold

The peer takes everything in before it answers, and copies it once, as an agent does.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.probes.echo_link import EchoLink, own_address
from llm_serving.diagnostics.probes.echo_words import Answer, Echo, EchoRaw, EchoTensor
from llm_serving.diagnostics.probes.timings import Budget, Timing, timed
from llm_serving.errors import ChannelError
from llm_serving.transport.address import format_address, new_socket
from llm_serving.transport.frames import MAX_FRAME_BYTES

__all__ = ["MEMORY", "NAMES", "SIZES", "channel_trips", "copy_speed", "memory_trips", "raw_trip"]

Bytes = npt.NDArray[np.uint8]

MEMORY = "shared memory + "  # and the transport that carries the doorbell
NAMES = {"tcp": "TCP loopback", "unix": "Unix socket"}
SIZES = tuple(64 * 16**i for i in range(6))  # 64 B, 1 KB, 16 KB, 256 KB, 4 MB, 64 MB

_RAW_TIMEOUT_S = 20.0
_GB = 1024**3


async def channel_trips(link: EchoLink, sizes: Sequence[int], budget: Budget) -> list[Timing]:
    """Sizes that do not fit into a frame are left out."""
    found = []
    for num_bytes in sizes:
        if num_bytes < MAX_FRAME_BYTES:
            seconds = await timed(partial(_echo, link, Echo(b"\xa5" * num_bytes)), budget)
            found.append(Timing.of(NAMES[link.transport], num_bytes, seconds))
    return found


async def memory_trips(link: EchoLink, sizes: Sequence[int], budget: Budget) -> list[Timing]:
    name = f"{MEMORY}{NAMES[link.transport]}"
    found = []
    for num_bytes in sizes:
        array = np.full(num_bytes, 0xA5, np.uint8)
        seconds = await timed(partial(_echo_tensor, link, array), budget)
        found.append(Timing.of(name, num_bytes, seconds))
    return found


async def raw_trip(link: EchoLink, num_bytes: int, budget: Budget) -> Timing:
    """One plain connection, blocking calls, no frames."""
    with own_address(link.transport) as address, new_socket(address) as waiting:
        waiting.settimeout(_RAW_TIMEOUT_S)
        waiting.bind(address)
        waiting.listen(1)
        where = waiting.getsockname()
        await link.channel.send(EchoRaw(format_address(where), num_bytes))
        peer, _ = waiting.accept()
        with peer:
            peer.settimeout(_RAW_TIMEOUT_S)
            if peer.family == socket.AF_INET:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data, buffer = b"\xa5" * num_bytes, memoryview(bytearray(num_bytes))
            seconds = await timed(partial(_echo_raw, peer, data, buffer), budget)
    return Timing.of(f"{NAMES[link.transport]}, raw socket", num_bytes, seconds)


async def copy_speed(link: EchoLink, num_bytes: int, budget: Budget) -> float:
    """GB/s of one core that copies an array into shared memory."""
    array = np.ones(num_bytes, np.uint8)
    seconds = await timed(partial(_write, link, array), budget)
    return num_bytes / _GB / Timing.of("copy", num_bytes, seconds).p50_us * 1e6


async def _echo(link: EchoLink, request: Echo) -> None:
    answer = await link.ask(request)
    if not isinstance(answer, Echo) or len(answer.data) != len(request.data):
        raise _strange(answer)


async def _echo_tensor(link: EchoLink, array: Bytes) -> None:
    slot = link.inputs.begin()
    if slot is None:
        raise ChannelError("the slot of the last round is still held")
    answer = await link.ask(EchoTensor(link.inputs.write(slot, array)))
    link.inputs.release(slot)
    if not isinstance(answer, EchoTensor):
        raise _strange(answer)
    if len(link.results.read(answer.ref).copy()) != len(array):
        raise _strange(answer)
    link.results.release(answer.ref.slot)


async def _echo_raw(peer: socket.socket, data: bytes, buffer: memoryview) -> None:
    await asyncio.sleep(0)  # somebody may want to stop
    peer.sendall(data)
    num = 0
    while num < len(buffer):
        more = peer.recv_into(buffer[num:])
        if not more:
            raise ChannelError("the peer closed the raw socket")
        num += more


async def _write(link: EchoLink, array: Bytes) -> None:
    slot = link.inputs.begin()
    if slot is None:
        raise ChannelError("the slot of the last round is still held")
    link.inputs.write(slot, array)
    link.inputs.release(slot)


def _strange(answer: Answer) -> ChannelError:
    return ChannelError(f"something else came back: {answer!r:.100}")
