"""One generation from opening to its last event, whatever words a family of routes has for it.

    opened          the output of a request, cancelled when nobody wants it any more
    whole_output    all events of it, for one answer
    send_events     event by event, in the words of an `EventFormat`

An answer begins when the first events are there, so whatever goes wrong while a request waits
still has its own status; after that an error is the last event.  All events that are ready
are one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from llm_serving.api.errors import ClientGone, DeadlineExceeded
from llm_serving.api.exchange import Exchange
from llm_serving.errors import RequestAborted, ServingError
from llm_serving.generation import FinishReason
from llm_serving.server.llm_server import GenerationRequest, LLMServer
from llm_serving.server.output_stream import OutputStream, TokenEvent

__all__ = ["EventFormat", "opened", "send_events", "stages_of", "whole_output"]


class EventFormat(Protocol):
    """How the events of one stream are written."""

    def event(self, event: TokenEvent) -> bytes:
        """One that is not the last."""

    def end(self, last: TokenEvent, stages: dict[str, float]) -> bytes:
        """The last one, and all that closes the stream; `stages` are milliseconds."""


@asynccontextmanager
async def opened(
    server: LLMServer, request: GenerationRequest, exchange: Exchange
) -> AsyncIterator[OutputStream]:
    """The output of `request`, cancelled when the client goes away or is given up."""
    stream = await server.open(request)
    watching = asyncio.create_task(_cancel_when_gone(exchange, stream))
    try:
        yield stream
        server.answered(stream)
    finally:
        watching.cancel()
        if stream.finish_reason is None:
            stream.cancel()


async def whole_output(stream: OutputStream, exchange: Exchange) -> list[TokenEvent]:
    """All events, the last included.  Raises why there is no good end, if there is none."""
    events = await stream.next()
    while not _is_last(events[-1]):
        events += await stream.next()
    if (failure := _failure(events[-1], stream, exchange)) is not None:
        raise failure
    return events


async def send_events(exchange: Exchange, stream: OutputStream, words: EventFormat) -> None:
    """One event per id; those that are ready together are one write."""
    has_ended = False
    while not has_ended:
        events = await stream.next()
        *earlier, last = events
        has_ended = _is_last(last)
        pieces = [words.event(event) for event in earlier]
        if has_ended and (failure := _failure(last, stream, exchange)) is not None:
            if exchange.has_started:
                await exchange.write(b"".join(pieces), is_last=False)
            raise failure
        stages = stages_of(stream) if has_ended or not exchange.has_started else {}
        pieces.append(words.end(last, stages) if has_ended else words.event(last))
        if not exchange.has_started:
            await exchange.start_stream(stages)
        await exchange.write(b"".join(pieces), is_last=has_ended)


def stages_of(stream: OutputStream) -> dict[str, float]:
    """Milliseconds of each stage so far, for people."""
    return {name: round(ms, 3) for name, ms in stream.timings().items()}


def _is_last(event: TokenEvent) -> bool:
    return event.finish_reason is not None or event.error is not None


def _failure(last: TokenEvent, stream: OutputStream, exchange: Exchange) -> Exception | None:
    """Why a request that has ended has no good end; None if it has one."""
    if exchange.is_disconnected:
        return ClientGone()
    if last.error is not None:
        return last.error
    if last.finish_reason is FinishReason.ABORT:
        return RequestAborted("the server has ended this request: it is shutting down")
    if last.finish_reason is FinishReason.ERROR:
        return ServingError("the request ended with an error")
    if last.finish_reason is FinishReason.TIMEOUT and not stream.generated_tokens:
        return DeadlineExceeded("the deadline has passed before the first token")
    return None


async def _cancel_when_gone(exchange: Exchange, stream: OutputStream) -> None:
    await exchange.watch()
    stream.cancel()
