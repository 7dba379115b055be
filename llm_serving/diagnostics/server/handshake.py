"""Is a stranger turned away?  Whoever has no key must be hung up on, and soon."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

from llm_serving.diagnostics.findings import Finding
from llm_serving.diagnostics.thresholds import verdict_of
from llm_serving.errors import AgentError, ChannelError, ConfigError
from llm_serving.transport import frames
from llm_serving.transport.address import Address, format_address, parse_address
from llm_serving.transport.handshake import HELLO, MAX_HELLO_BYTES, Hello, handshake

__all__ = ["check_listener", "refusal_ms"]

_TIMEOUT_S = 5.0
_REFUSED = "nobody listens there: the server is about to end, or it runs in another container"
_NOT_OPEN = {
    PermissionError: "it is another user's socket: not permitted, and so it should be",
    FileNotFoundError: "that file is not here: the server runs in another container, or has ended",
    ConnectionRefusedError: _REFUSED,
}


async def refusal_ms(address: Address, timeout_s: float = _TIMEOUT_S) -> float:
    """From our wrong proof to the end of the connection.

    Raises ChannelError if the peer does not hang up in time or does not greet as ours does, and
    OSError if nobody lets us connect.
    """
    steps = handshake(secrets.token_bytes(32), Hello.of(0), "agent")
    async with asyncio.timeout(timeout_s):
        reader, writer = await _connected(address)
    try:
        async with asyncio.timeout(timeout_s):
            writer.write(frames.encode(next(steps), MAX_HELLO_BYTES))
            theirs = frames.decode(HELLO, await _next_body(reader))
            writer.write(frames.encode(steps.send(theirs), MAX_HELLO_BYTES))
            began = time.perf_counter()
            with contextlib.suppress(ConnectionError):  # it need not say goodbye
                while await reader.read(MAX_HELLO_BYTES):
                    pass  # its own proof, perhaps
            return (time.perf_counter() - began) * 1e3
    except TimeoutError:
        raise ChannelError(
            f"a peer with a wrong key was not turned away in {timeout_s:g} s"
        ) from None
    finally:
        writer.close()


async def check_listener(agent: Mapping[str, Any]) -> Finding:
    """That of the running server, at the address that /info shows for an agent."""
    item = "agents' listener"
    try:
        address = parse_address(str(agent.get("address")))
        ms = await refusal_ms(address)
    except (ChannelError, AgentError, ConfigError) as exc:
        cure = "update the server; until then let nobody else log in to this machine"
        return Finding(item, "broken", str(exc), cure)
    except (OSError, TimeoutError) as exc:
        why = _NOT_OPEN.get(type(exc), str(exc))
        return Finding(item, "skipped", f"{agent.get('address')} is not open to us: {why}")
    words = f"{format_address(address)} turned a wrong key away after {ms:.1f} ms"
    return Finding(item, verdict_of("refusal", ms), words, values={"ms": round(ms, 3)})


async def _connected(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(address, str):
        return await asyncio.open_unix_connection(address)
    return await asyncio.open_connection(*address)


async def _next_body(reader: asyncio.StreamReader) -> bytes:
    """One small frame.  Raises ChannelError for a longer one, or if there is none."""
    try:
        head = await reader.readexactly(frames.HEAD_BYTES)
        num_bytes = int.from_bytes(head, "big")
        if num_bytes > MAX_HELLO_BYTES:
            raise ChannelError(f"{num_bytes} bytes where a greeting belongs")
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise ChannelError("the peer hung up before it greeted") from None
