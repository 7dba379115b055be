"""What stands around every route: one exchange per request, and an answer whatever goes wrong.

    socket -> Edge (makes the Exchange) -> FastAPI's router -> Endpoint -> the exchange -> socket

`Edge` is the outermost layer; the routes of the web framework itself (documentation, 404) pass
through it and get the same two headers.  An `Endpoint` is one of the outermost loops: nothing it
does wrong gets past it without an answer and a line in the log.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_serving.api.errors import ClientGone
from llm_serving.api.exchange import Exchange
from llm_serving.api.settings import ApiSettings
from llm_serving.errors import ServingError, Unavailable

__all__ = ["Edge", "Endpoint", "exchange_of"]

logger = logging.getLogger(__name__)

_EXCHANGE = "llm_serving.exchange"


class Edge:
    def __init__(
        self, app: ASGIApp, settings: ApiSettings, retry_after_s: Callable[[], float]
    ) -> None:
        """`retry_after_s` says when it pays to come back, for those that are turned away."""
        self._app = app
        self._settings = settings
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._settings, self._retry_after_s)
        scope[_EXCHANGE] = exchange
        await self._app(scope, receive, exchange.send)


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `Edge` has made for this request."""
    exchange: Exchange = scope[_EXCHANGE]
    return exchange


class Endpoint(ABC):
    """A route as a bare ASGI application."""

    @abstractmethod
    async def answer(self, exchange: Exchange) -> None:
        """Answer, or raise: an error of the tree gets its status, anything else is 500."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        exchange.path_params = scope["path_params"]
        try:
            await self._attempt(exchange)
        except ClientGone:
            logger.debug("request %s: the client has gone away", exchange.request_id)

    async def _attempt(self, exchange: Exchange) -> None:
        try:
            await self.answer(exchange)
        except ClientGone:
            raise
        except ServingError as exc:
            if type(exc).code == ServingError.code:
                logger.error("request %s failed", exchange.request_id, exc_info=exc)
            await exchange.fail(exc)
        except asyncio.CancelledError:  # the HTTP server waits no longer, and for nobody
            if exchange.has_started:
                raise ClientGone from None
            await exchange.fail(Unavailable("the server is shutting down"))
        except Exception as exc:
            logger.exception("request %s failed", exchange.request_id)
            await exchange.fail(exc)
