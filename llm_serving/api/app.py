"""The HTTP application: which path leads to which endpoint, and what is documented.

One model is served, so a path without `/models/{model}` means it.  FastAPI does the routing and
the documentation pages; the endpoints are bare ASGI applications (see `endpoint`), so nothing
is between a token and the socket.  A family of routes is a function that lists them: the next
one is added in `create_app`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from llm_serving.api.docs_page import DocsPage
from llm_serving.api.endpoint import Edge, exchange_of
from llm_serving.api.errors import Problem, problem_of, problem_of_status
from llm_serving.api.openai import Completions, ModelCard, Models
from llm_serving.api.openai_answer import Completion, Model, ModelList
from llm_serving.api.openai_errors import OpenAIErrorBody
from llm_serving.api.openai_schema import CompletionBody
from llm_serving.api.openapi import ApiRoute, Operation, openapi_document
from llm_serving.api.operation import Info, Livez, MetricsText, Readyz, Status, Trace
from llm_serving.api.schema import GenerateBody
from llm_serving.api.settings import ApiSettings
from llm_serving.api.tgi import Generate
from llm_serving.api.tgi_answer import Answer, StreamEvent
from llm_serving.api.tokens import (
    Detokenize,
    DetokenizeBody,
    Detokenized,
    DetokenizeIdsBody,
    TextToken,
    Tokenize,
    Tokenized,
    TokenizeInputsBody,
    TokenizePromptBody,
)
from llm_serving.metrics import Metrics
from llm_serving.server.llm_server import LLMServer

__all__ = ["ApiSettings", "create_app"]

TITLE = "llm-serving"
_BODY_ERRORS = ("400", "404", "413", "422", "500")
_GENERATE_ERRORS = (*_BODY_ERRORS, "429", "503", "504")
_COMPLETION_ERRORS = tuple(status for status in _GENERATE_ERRORS if status != "422")
JSON, EVENTS = "application/json", "text/event-stream"


def create_app(
    server: LLMServer,
    *,
    settings: ApiSettings,
    info: Callable[[], dict[str, object]],
    metrics: Metrics,
    trace: Callable[[int], dict[str, object]],
    version: str,
) -> FastAPI:
    """The application that serves `server`; it starts and stops nothing."""
    app = _Application(settings, version, server.retry_after_s)
    routes = [
        *_tgi_routes(server, settings),
        *_openai_routes(server, settings),
        *_token_routes(server, settings),
        *_operation_routes(server, settings, info, metrics, trace),
    ]
    app.router.routes[:0] = routes  # before the document: they are asked for more often
    app.router.routes.append(Route("/docs", DocsPage(app.openapi)))
    return app


class _Application(FastAPI):
    def __init__(
        self, settings: ApiSettings, version: str, retry_after_s: Callable[[], float]
    ) -> None:
        super().__init__(
            title=TITLE,
            version=version,
            docs_url=None,  # it loads its scripts from the network: see `docs_page`
            redoc_url=None,
            redirect_slashes=False,  # a client that posts does not follow
            exception_handlers={
                HTTPException: _on_http_exception,
                RequestValidationError: _on_invalid,
                Exception: _on_bug,
            },
        )
        self._settings = settings
        self._retry_after_s = retry_after_s

    def build_middleware_stack(self) -> ASGIApp:
        """Everything else is inside the edge: what an endpoint sends passes nothing on its way."""
        return Edge(super().build_middleware_stack(), self._settings, self._retry_after_s)

    def openapi(self) -> dict[str, Any]:
        return openapi_document(self.router.routes, self.title, self.version)


def _tgi_routes(server: LLMServer, settings: ApiSettings) -> list[ApiRoute]:
    events = {EVENTS: StreamEvent}
    generate = Operation(
        "Generate text: one answer, or events if `stream` is true",
        {JSON: Answer, **events},
        (GenerateBody,),
        _GENERATE_ERRORS,
    )
    always = Operation(
        "Generate text as server-sent events", events, (GenerateBody,), _GENERATE_ERRORS
    )
    array = Operation(
        "Generate text: an array of one answer, or events if `stream` is true",
        {JSON: list[Answer], **events},
        (GenerateBody,),
        _GENERATE_ERRORS,
    )
    answer = Generate(server, settings)
    stream = Generate(server, settings, always_stream=True)
    root = Generate(server, settings, as_array=True)
    return [
        # a name may hold slashes, as on the Hugging Face hub; so the longer paths come first
        ApiRoute("/generate", answer, "POST", generate),
        ApiRoute("/generate_stream", stream, "POST", always),
        ApiRoute("/models/{model:path}/generate", answer, "POST", generate),
        ApiRoute("/models/{model:path}/generate_stream", stream, "POST", always),
        ApiRoute("/models/{model:path}", root, "POST", array),
        ApiRoute("/", root, "POST", array),
    ]


def _openai_routes(server: LLMServer, settings: ApiSettings) -> list[ApiRoute]:
    completions = Operation(
        "Complete a prompt: one answer, or chunks and [DONE] if `stream` is true",
        {JSON: Completion, EVENTS: Completion},
        (CompletionBody,),
        _COMPLETION_ERRORS,
        OpenAIErrorBody,
    )
    models = Operation(
        "The names the model is served under", {JSON: ModelList}, (), ("500",), OpenAIErrorBody
    )
    card = Operation("One of these names", {JSON: Model}, error_body=OpenAIErrorBody)
    return [
        ApiRoute("/v1/completions", Completions(server, settings), "POST", completions),
        ApiRoute("/v1/models", Models(server, settings), "GET", models),
        ApiRoute("/v1/models/{model:path}", ModelCard(server, settings), "GET", card),
    ]


def _token_routes(server: LLMServer, settings: ApiSettings) -> list[ApiRoute]:
    tokenize = Operation(
        "The tokens of a text",
        {JSON: list[TextToken] | Tokenized},
        (TokenizeInputsBody, TokenizePromptBody),
        _BODY_ERRORS,
    )
    detokenize = Operation(
        "The text of tokens",
        {JSON: Detokenized},
        (DetokenizeBody, DetokenizeIdsBody),
        _BODY_ERRORS,
    )
    return [
        ApiRoute("/tokenize", Tokenize(server, settings), "POST", tokenize),
        ApiRoute("/detokenize", Detokenize(server, settings), "POST", detokenize),
    ]


def _operation_routes(
    server: LLMServer,
    settings: ApiSettings,
    info: Callable[[], dict[str, object]],
    metrics: Metrics,
    trace: Callable[[int], dict[str, object]],
) -> list[ApiRoute]:
    readyz, described = Readyz(server, settings), Info(info, settings)
    ready = Operation(
        "Whether a request sent now would be served", {JSON: Status}, errors=("404", "503")
    )
    about = Operation("What is served, and how", {JSON: dict[str, Any]})
    alive = Operation("The front end answers", {JSON: Status}, errors=())
    steps = Operation(
        "When each part of the last steps began, in nanoseconds of one monotonic clock",
        {JSON: dict[str, Any]},
        errors=("422", "500"),
    )
    text = Operation("Metrics for Prometheus", {"text/plain": str}, errors=("500",))
    return [
        ApiRoute("/livez", Livez(), "GET", alive),
        ApiRoute("/readyz", readyz, "GET", ready),
        ApiRoute("/health", readyz, "GET", ready),
        ApiRoute("/metrics", MetricsText(metrics), "GET", text),
        ApiRoute("/trace", Trace(trace), "GET", steps),
        ApiRoute("/info", described, "GET", about),
        ApiRoute("/models/{model:path}/info", described, "GET", about),
        ApiRoute("/models/{model:path}/health", readyz, "GET", ready),
    ]


async def _on_http_exception(request: Request, exc: Exception) -> JSONResponse:
    """No such path or method, in the envelope of the path's family."""
    if not isinstance(exc, HTTPException):
        return await _on_bug(request, exc)
    sentence = f"{exc.detail}: {request.method} {request.url.path[:200]}"
    answer = _json(request, problem_of_status(exc.status_code, sentence))
    answer.headers.update(exc.headers or {})
    return answer


async def _on_invalid(request: Request, exc: Exception) -> JSONResponse:
    return _json(request, problem_of_status(422, str(exc)))


async def _on_bug(request: Request, exc: Exception) -> JSONResponse:
    return _json(request, problem_of(exc, exchange_of(request.scope).request_id))


def _json(request: Request, problem: Problem) -> JSONResponse:
    status, body = exchange_of(request.scope).envelope(problem)
    return JSONResponse(msgspec.to_builtins(body), status)
