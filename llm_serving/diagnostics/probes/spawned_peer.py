"""A process of ours that has to connect: it is the one that comes, or it says why it did not."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from llm_serving.errors import AgentDied, AgentTimeout, ChannelError
from llm_serving.transport.channel import SocketChannel
from llm_serving.transport.listener import Listener
from llm_serving.worker.agent_process import AgentProcess

__all__ = ["accept_from"]

Out = TypeVar("Out")
Msg = TypeVar("Msg")


async def accept_from(
    process: AgentProcess, listener: Listener[Out, Msg], timeout_s: float
) -> SocketChannel[Out, Msg]:
    """Its proved channel.  Raises AgentDied if it ends first, with what it has printed."""
    accepting = asyncio.create_task(listener.accept())
    try:
        ends = {accepting, process.exited}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if accepting.done():
            channel, hello = accepting.result()
        elif process.exited.done():
            raise AgentDied(await process.how_it_ended())
        else:
            raise AgentTimeout(f"pid {process.pid} has not connected within {timeout_s:g} s")
    finally:
        accepting.cancel()
    if hello.pid != process.pid:
        await channel.close()
        raise ChannelError(f"pid {hello.pid} came where pid {process.pid} belongs")
    return channel
