"""The TGI family: `/models/{model}/generate` and its relatives."""

from __future__ import annotations

import msgspec

from llm_serving.api.body import parse_json
from llm_serving.api.endpoint import Endpoint
from llm_serving.api.exchange import Exchange
from llm_serving.api.names import check_name
from llm_serving.api.schema import GenerateBody, read
from llm_serving.api.settings import ApiSettings
from llm_serving.api.sse import encode_event
from llm_serving.api.streaming import opened, send_events, stages_of, whole_output
from llm_serving.api.tgi_answer import answer_of, last_event, stream_event
from llm_serving.api.tgi_request import to_request
from llm_serving.server.llm_server import LLMServer
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
        async with opened(self._server, request, exchange) as stream:
            if is_streamed:
                await send_events(exchange, stream, _Events(stream, prefix))
            else:
                await self._send_answer(exchange, stream, prefix, bool(parameters.details))

    async def _send_answer(
        self, exchange: Exchange, stream: OutputStream, prefix: str, details: bool
    ) -> None:
        events = await whole_output(stream, exchange)
        stages = stages_of(stream)
        answer = answer_of(events, stream, prefix, stages if details else None)
        body = msgspec.json.encode([answer] if self._as_array else answer)
        await exchange.answer(200, body, stages=stages)


class _Events:
    """A stream in TGI's words."""

    def __init__(self, stream: OutputStream, prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix

    def event(self, event: TokenEvent) -> bytes:
        return encode_event(stream_event(event))

    def end(self, last: TokenEvent, stages: dict[str, float]) -> bytes:
        return encode_event(last_event(last, self._stream, self._prefix, stages))
