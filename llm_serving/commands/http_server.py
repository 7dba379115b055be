"""uvicorn as we need it: our signals, our log, and a word when it listens."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

__all__ = ["LAST_EVENTS_S", "HttpServer"]

LAST_EVENTS_S = 5.0  # for clients to take what ends their streams


class HttpServer(uvicorn.Server):
    """Without uvicorn's signal handlers: it re-raises SIGTERM, so the exit code would be -15."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=65,  # longer than what a load balancer usually keeps
                timeout_graceful_shutdown=int(LAST_EVENTS_S),
            )
        )
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
