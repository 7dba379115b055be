"""A probe's connection to its peer: a spawned process, our handshake, two segments.

As between a server and an agent: this end runs on an event loop (SocketChannel), the peer's does
not (BlockingChannel).  Leaving the link removes process, socket and segments, whatever happened.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_serving.diagnostics.places import socket_root
from llm_serving.diagnostics.probes.echo_words import ANSWERS, Answer, Request, Share
from llm_serving.diagnostics.probes.spawned_peer import accept_from
from llm_serving.transport.address import Address, format_address
from llm_serving.transport.arena import Arena
from llm_serving.transport.channel import SocketChannel
from llm_serving.transport.listener import listen
from llm_serving.transport.socket_folder import SocketFolder, runtime_folder
from llm_serving.worker.agent_process import AgentProcess

__all__ = ["ECHO_PEER", "EchoLink", "Transport", "own_address"]

Transport = Literal["tcp", "unix"]

ECHO_PEER = (sys.executable, "-m", "llm_serving.diagnostics.probes.echo_peer")
_START_S = 20.0
_ANSWER_S = 20.0
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class EchoLink:
    transport: Transport
    channel: SocketChannel[Request, Answer]
    inputs: Arena  # this end writes, one slot
    results: Arena  # the peer writes, one slot

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        transport: Transport,
        slot_bytes: int,
        *,
        command: Sequence[str] = ECHO_PEER,
        on_event: Callable[[str], None],
    ) -> AsyncIterator[EchoLink]:
        """Raises ConfigError or AgentError with the reason."""
        async with contextlib.AsyncExitStack() as stack:
            address = stack.enter_context(own_address(transport))
            channel = await _connected(stack, address, command, on_event)
            inputs = Arena.create(1, slot_bytes, writes=True)
            stack.callback(inputs.close)
            results = Arena.create(1, slot_bytes, writes=False)
            stack.callback(results.close)
            await channel.send(Share(inputs.name, results.name))
            yield cls(transport, channel, inputs, results)

    async def ask(self, request: Request) -> Answer:
        await self.channel.send(request)
        return await self.channel.recv(_ANSWER_S)


@contextlib.contextmanager
def own_address(transport: Transport) -> Iterator[Address]:
    """Where to listen; a Unix socket's folder is removed at the end, the runtime folder if new."""
    if transport == "tcp":
        yield "127.0.0.1", 0
        return
    was_there = socket_root().exists()
    root = runtime_folder()
    folder = SocketFolder.create(root)
    try:
        yield folder.socket_path
    finally:
        folder.close()
        if not was_there:
            with contextlib.suppress(OSError):  # somebody else has come in
                root.rmdir()


async def _connected(
    stack: contextlib.AsyncExitStack,
    address: Address,
    command: Sequence[str],
    on_event: Callable[[str], None],
) -> SocketChannel[Request, Answer]:
    key = secrets.token_bytes(32)
    listener = await listen(address, key, ANSWERS)
    stack.push_async_callback(listener.close)
    where = format_address(listener.address)
    process = await AgentProcess.spawn(command, 0, key, on_event, address=where, epoch=0)
    stack.push_async_callback(process.end, _GRACE_S)
    channel = await accept_from(process, listener, _START_S)
    stack.push_async_callback(channel.close)
    return channel
