"""Waits for peers, and lets in only those that have proved the key."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from llm_serving.errors import AgentError
from llm_serving.transport import frames
from llm_serving.transport.address import Address, new_socket
from llm_serving.transport.channel import SocketChannel
from llm_serving.transport.handshake import Hello

__all__ = ["Listener", "listen"]

Out = TypeVar("Out")
Msg = TypeVar("Msg")

_RETRY_S = 1.0


class Listener(Generic[Out, Msg]):
    def __init__(
        self, waiting: socket.socket, key: bytes, decoder: msgspec.msgpack.Decoder[Msg]
    ) -> None:
        self.address: Address = waiting.getsockname()
        self._socket = waiting
        self._key = key
        self._decoder = decoder
        self._accepted: asyncio.Queue[tuple[SocketChannel[Out, Msg], Hello]] = asyncio.Queue()
        self._tasks = {asyncio.create_task(self._accept_all())}

    async def accept(self, timeout_s: float | None = None) -> tuple[SocketChannel[Out, Msg], Hello]:
        """The next proved peer and who it says it is; AgentTimeout if none comes."""
        with frames.peer_errors():
            async with asyncio.timeout(timeout_s):
                return await self._accepted.get()

    async def close(self) -> None:
        """Nobody comes in any more; the channels that `accept` gave live on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._accepted.empty():
            await self._accepted.get_nowait()[0].close()
        self._socket.close()
        if isinstance(self.address, str):
            with suppress(FileNotFoundError):
                os.unlink(self.address)

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(self._socket)
            except OSError:  # this process is out of descriptors, perhaps not for long
                await asyncio.sleep(_RETRY_S)
                continue
            greeting = asyncio.create_task(self._greet(peer))
            self._tasks.add(greeting)
            greeting.add_done_callback(self._tasks.discard)

    async def _greet(self, peer: socket.socket) -> None:
        channel = SocketChannel[Out, Msg](peer, self._decoder)
        try:
            hello = await channel.prove(self._key, Hello.of(-1), "master")
        except AgentError:
            await channel.close()
        except BaseException:
            await channel.close()
            raise
        else:
            self._accepted.put_nowait((channel, hello))


async def listen(
    address: Address, key: bytes, decoder: msgspec.msgpack.Decoder[Msg]
) -> Listener[Any, Msg]:
    """Port 0 takes a free one.  A Unix socket is this user's alone.  Raises OSError."""
    waiting = new_socket(address)
    try:
        waiting.setblocking(False)
        waiting.bind(address)
        if isinstance(address, str):
            os.chmod(address, 0o600)
        waiting.listen()
    except OSError:
        waiting.close()
        raise
    return Listener[Any, Msg](waiting, key, decoder)
