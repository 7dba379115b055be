"""The OpenAI family: `/v1/completions`, and `/v1/models` that its clients ask for first."""

from __future__ import annotations

import time

import msgspec

from llm_serving.api.body import parse_json
from llm_serving.api.endpoint import Endpoint
from llm_serving.api.exchange import Exchange
from llm_serving.api.names import check_name
from llm_serving.api.openai_answer import CompletionWords, Model, ModelList
from llm_serving.api.openai_request import in_openai_words, to_request
from llm_serving.api.openai_schema import CompletionBody
from llm_serving.api.schema import read
from llm_serving.api.settings import ApiSettings
from llm_serving.api.streaming import opened, send_events, stages_of, whole_output
from llm_serving.errors import InvalidRequest
from llm_serving.server.llm_server import GenerationRequest, LLMServer

__all__ = ["Completions", "ModelCard", "Models"]

OWNER = "llm-serving"


class Completions(Endpoint):
    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._server = server
        self._settings = settings

    async def answer(self, exchange: Exchange) -> None:
        body = read(CompletionBody, parse_json(await exchange.read_body()))
        check_name(body.model, self._settings.served_names)
        request = to_request(
            body,
            vocab_size=self._server.tokenizer.vocab_size,
            trace_id=exchange.request_id,
            arrived_s=exchange.arrived_s,
            received_s=exchange.received_s,
        )
        try:
            await self._generate(exchange, body, request)
        except InvalidRequest as exc:
            raise InvalidRequest(in_openai_words(str(exc))) from exc

    async def _generate(
        self, exchange: Exchange, body: CompletionBody, request: GenerationRequest
    ) -> None:
        async with opened(self._server, request, exchange) as stream:
            completion_id = f"cmpl-{exchange.request_id}"
            words = CompletionWords(stream, self._server.tokenizer, body, completion_id)
            if body.stream:
                await send_events(exchange, stream, words)
            else:
                events = await whole_output(stream, exchange)
                answer = msgspec.json.encode(words.answer(events))
                await exchange.answer(200, answer, stages=stages_of(stream))


class Models(Endpoint):
    """All names the model is served under, each as a model of its own."""

    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._models = [_model(name, server) for name in settings.served_names]

    async def answer(self, exchange: Exchange) -> None:
        await exchange.answer(200, msgspec.json.encode(ModelList("list", self._models)))


class ModelCard(Endpoint):
    """One of them."""

    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._models = {name: _model(name, server) for name in settings.served_names}

    async def answer(self, exchange: Exchange) -> None:
        name = exchange.path_params["model"]
        check_name(name, tuple(self._models))
        await exchange.answer(200, msgspec.json.encode(self._models[name.removesuffix("/")]))


def _model(name: str, server: LLMServer) -> Model:
    limits = server.limits
    return Model(name, "model", int(time.time()), OWNER, limits.max_model_len, limits.context)
