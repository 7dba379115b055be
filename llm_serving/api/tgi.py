"""The TGI family: `/models/{model}/generate` and its relatives.

An answer begins when the first events are there, so whatever goes wrong while a request waits
still has its own status; after that an error is the last event.  All events that are ready
are one write.  A client that goes away cancels its request, streamed or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from llm_serving.api.body import parse_json
from llm_serving.api.endpoint import Endpoint
from llm_serving.api.errors import ClientGone, DeadlineExceeded
from llm_serving.api.exchange import Exchange
from llm_serving.api.names import check_name
from llm_serving.api.schema import GenerateBody, read
from llm_serving.api.settings import ApiSettings
from llm_serving.api.sse import encode_event
from llm_serving.api.tgi_answer import answer_of, last_event, stream_event
from llm_serving.api.tgi_request import to_request
from llm_serving.errors import RequestAborted, ServingError
from llm_serving.generation import FinishReason
from llm_serving.server.llm_server import GenerationRequest, LLMServer
from llm_serving.server.output_stream import OutputStream, TokenEvent

__all__ = ["Generate"]


class Generate(Endpoint):
    def __init__(
        self,
        server: LLMServer,
        settings: ApiSettings,
        *,
        always_stream: bool = False,
        as_array: bool = False,
    ) -> None:
        """`as_array`: an answer that is not streamed is an array of one, as TGI's root gives it."""
        self._server = server
        self._settings = settings
        self._always_stream = always_stream
        self._as_array = as_array

    async def answer(self, exchange: Exchange) -> None:
        content = await exchange.read_body()
        check_name(exchange.path_params.get("model"), self._settings.served_names)
        body = read(GenerateBody, parse_json(content))
        parameters, is_streamed = body.given(), self._always_stream or bool(body.stream)
        request = to_request(
            body,
            is_streamed=is_streamed,
            trace_id=exchange.request_id,
            arrived_s=exchange.arrived_s,
            received_s=exchange.received_s,
            max_timeout_s=self._server.limits.max_timeout_s,
        )
        prefix = body.inputs if parameters.return_full_text else ""
        async with _open(self._server, request, exchange) as stream:
            if is_streamed:
                await _send_events(exchange, stream, prefix)
            else:
                await self._send_answer(exchange, stream, prefix, bool(parameters.details))

    async def _send_answer(
        self, exchange: Exchange, stream: OutputStream, prefix: str, details: bool
    ) -> None:
        events = await stream.next()
        while not _is_last(events[-1]):
            events += await stream.next()
        if (failure := _failure(events[-1], stream, exchange)) is not None:
            raise failure
        answer = answer_of(events, stream, prefix, details=details)
        body = msgspec.json.encode([answer] if self._as_array else answer)
        await exchange.answer(200, body, stages=exchange.stages(stream.timings()))


async def _send_events(exchange: Exchange, stream: OutputStream, prefix: str) -> None:
    """One event per id; those that are ready together are one write."""
    has_ended = False
    while not has_ended:
        events = await stream.next()
        *earlier, last = events
        has_ended = _is_last(last)
        pieces = [encode_event(stream_event(event)) for event in earlier]
        if has_ended and (failure := _failure(last, stream, exchange)) is not None:
            if exchange.has_started:
                await exchange.write(b"".join(pieces), is_last=False)
            raise failure
        stages = exchange.stages(stream.timings()) if has_ended or not exchange.has_started else {}
        end = last_event(last, stream, prefix, stages) if has_ended else stream_event(last)
        pieces.append(encode_event(end))
        if not exchange.has_started:
            await exchange.start_stream(stages)
        await exchange.write(b"".join(pieces), is_last=has_ended)


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


@asynccontextmanager
async def _open(
    server: LLMServer, request: GenerationRequest, exchange: Exchange
) -> AsyncIterator[OutputStream]:
    """The output of `request`, cancelled when the client goes away or is given up."""
    stream = await server.open(request)
    watching = asyncio.create_task(_cancel_when_gone(exchange, stream))
    try:
        yield stream
    finally:
        watching.cancel()
        if stream.finish_reason is None:
            stream.cancel()


async def _cancel_when_gone(exchange: Exchange, stream: OutputStream) -> None:
    await exchange.watch()
    stream.cancel()
