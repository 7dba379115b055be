"""What an operator, a probe or a dashboard asks: is it alive, ready, what is it, how is it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from llm_serving.api.endpoint import Endpoint
from llm_serving.api.exchange import Exchange
from llm_serving.api.names import check_name
from llm_serving.api.settings import ApiSettings
from llm_serving.errors import InvalidRequest, Unavailable
from llm_serving.metrics import CONTENT_TYPE, MAX_TRACE_STEPS, Metrics
from llm_serving.server.llm_server import LLMServer

__all__ = ["Info", "Livez", "MetricsText", "Readyz", "Status", "Trace"]


class Status(msgspec.Struct, frozen=True):
    status: str


class Livez(Endpoint):
    """The front end answers; it asks nobody else."""

    async def answer(self, exchange: Exchange) -> None:
        await exchange.answer(200, msgspec.json.encode(Status("alive")))


class Readyz(Endpoint):
    """200 only if a request sent now would be served.  It enqueues no work."""

    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._server = server
        self._settings = settings

    async def answer(self, exchange: Exchange) -> None:
        check_name(exchange.path_params.get("model"), self._settings.served_names)
        reason = self._server.unready_reason()
        if reason is not None:
            raise Unavailable(f"not ready: {reason}")
        await exchange.answer(200, msgspec.json.encode(Status("ready")))


class Info(Endpoint):
    """What is served, and how: whatever `info` says now."""

    def __init__(self, info: Callable[[], dict[str, object]], settings: ApiSettings) -> None:
        self._info = info
        self._settings = settings

    async def answer(self, exchange: Exchange) -> None:
        check_name(exchange.path_params.get("model"), self._settings.served_names)
        await exchange.answer(200, msgspec.json.encode(self._info()))


class Trace(Endpoint):
    """The last steps, stamp by stamp: `?steps=N` of them, or all that are kept."""

    def __init__(self, trace: Callable[[int], dict[str, object]]) -> None:
        self._trace = trace

    async def answer(self, exchange: Exchange) -> None:
        wanted = exchange.query("steps") or str(MAX_TRACE_STEPS)
        if not (wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 and int(wanted) > 0):
            raise InvalidRequest(f"steps: expected 1 or more, found {wanted[:20]!r}")
        await exchange.answer(200, msgspec.json.encode(self._trace(int(wanted))))


class MetricsText(Endpoint):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def answer(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._metrics.render(), CONTENT_TYPE.encode())
