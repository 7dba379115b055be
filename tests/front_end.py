"""The whole front end over a model without weights: HTTP, server, master, and a fake worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.types import Message

from llm_serving.api.app import ApiSettings, create_app
from llm_serving.master.async_master import AsyncMaster
from llm_serving.master.block_pool import BlockPool
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.metrics import Metrics, StepMetrics
from llm_serving.server.llm_server import LLMServer, ServerLimits
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.step_arrays import StepInputs, StepResult
from llm_serving.testing import FakeWorker
from tests.tiny_tokenizer import tiny_tokenizer_path

__all__ = [
    "AlternativesWorker",
    "FrontEnd",
    "PausedWorker",
    "RawCall",
    "events_of",
    "front_end",
    "socket_of",
    "until",
]

BLOCK_SIZE = 4
SETTINGS = ApiSettings(served_names=("llama2", "org/tiny"))


class PausedWorker(FakeWorker):
    """Computes a step when it is told to."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, BLOCK_SIZE)
        self._num_held = 0
        self._arrived = asyncio.Event()

    async def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            while not self._num_held:
                self._arrived.clear()
                await self._arrived.wait()
            self._num_held -= 1
            super()._resolve()

    def _resolve(self) -> None:
        self._num_held += 1
        self._arrived.set()


class AlternativesWorker(FakeWorker):
    """Beside each sampled id, the two likeliest: itself, and the next."""

    def _outcome(self, inputs: StepInputs, fault: Exception | str | None) -> StepResult | Exception:
        outcome = super()._outcome(inputs, fault)
        if isinstance(outcome, Exception):
            return outcome
        ids = np.stack([outcome.token_ids, (outcome.token_ids + 1) % 50], axis=1)
        logprobs = np.broadcast_to(np.array([-0.5, -1.5], np.float32), ids.shape)
        return msgspec.structs.replace(outcome, top_ids=ids, top_logprobs=logprobs)


class RawCall:
    """One call of an ASGI application, to see every message and to disturb it."""

    def __init__(self, app: FastAPI, path: str, body: Any, method: str = "POST") -> None:
        self.sent: list[Message] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.is_gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    @property
    def pieces(self) -> list[bytes]:
        return [m["body"] for m in self.sent if m["type"] == "http.response.body"]

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.may_send.wait()
        self.sent.append(message)


@dataclass
class FrontEnd:
    app: FastAPI
    server: LLMServer
    scheduler: Scheduler
    master: AsyncMaster
    worker: FakeWorker
    client: httpx.AsyncClient

    async def post(self, path: str, body: Any, **parameters: Any) -> httpx.Response:
        """`body` as JSON; a string becomes its `inputs`, with `parameters`."""
        if isinstance(body, str):
            body = {"inputs": body, "parameters": parameters}
        return await self.client.post(path, content=json.dumps(body))

    async def generate(self, inputs: str, **parameters: Any) -> dict[str, Any]:
        answer = await self.post("/generate", inputs, **parameters)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - no one event stands for them all
            await asyncio.sleep(0)


def events_of(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, every event in its strict form."""
    assert text.endswith("\n\n")
    pieces = text[:-2].split("\n\n")
    assert all(piece.startswith("data: ") and "\n" not in piece for piece in pieces)
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


@contextlib.asynccontextmanager
async def front_end(
    folder: pathlib.Path,
    *,
    worker: FakeWorker | None = None,
    settings: ApiSettings = SETTINGS,
    num_blocks: int = 64,
    limits: Limits | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> AsyncIterator[FrontEnd]:
    """A pool of `num_blocks` blocks of BLOCK_SIZE, and a context of 128 tokens."""
    worker = worker or FakeWorker(num_blocks, BLOCK_SIZE)
    steps = StepMetrics()
    metrics = Metrics(settings.served_names[0], lambda: master.stats(), steps=steps)
    server = LLMServer(
        tokenizer=Tokenizer(tiny_tokenizer_path(folder)),
        limits=ServerLimits(128, num_blocks * BLOCK_SIZE, BLOCK_SIZE),
        eos_token_ids=eos_token_ids,
        cache_salt=b"",
        metrics=metrics,
        health=lambda: master.unhealthy_reason,
    )
    scheduler = Scheduler(BlockPool(num_blocks, BLOCK_SIZE), limits or Limits())
    master = AsyncMaster(scheduler, worker, server.publish, observe=steps.observe)
    server.attach(master)
    info = {"model_id": settings.served_names[0], "max_total_tokens": 128}
    app = create_app(
        server,
        settings=settings,
        info=lambda: dict(info),
        metrics=metrics,
        trace=steps.trace,
        version="1.2.3",
    )
    transport = httpx.ASGITransport(app)
    running = asyncio.create_task(master.run())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await asyncio.sleep(0)  # the master finds its agent
        yield FrontEnd(app, server, scheduler, master, worker, client)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def socket_of(app: FastAPI) -> AsyncIterator[int]:
    """The port of a real HTTP server around `app`, in this event loop."""
    config = uvicorn.Config(
        app,
        port=0,
        http="httptools",
        log_level="error",
        lifespan="off",
        timeout_graceful_shutdown=1,  # a test that fails must not wait for its open connections
    )
    server = uvicorn.Server(config)
    server.config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield port
    finally:
        await server.shutdown()
