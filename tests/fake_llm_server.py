"""A scripted LLM server for the load test: real sockets, TGI's and OpenAI's words, no model.

It runs on a thread of its own.  A token is a word; the i-th generate request gets what
`script(i)` says.  What came is kept in `bodies`, so that a test can look at it.

    with FakeLlmServer(lambda i: Fate(status=503) if i == 2 else Fate()) as server: ...
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BARE_DECODE_MS", "DECODE_PERIOD_S", "DECODE_ROWS", "INFO", "FakeLlmServer", "Fate"]

BARE_DECODE_MS = {"context": 128, "rows": {"1": 4.0, "3": 8.0}}
INFO: dict[str, Any] = {
    "model_id": "fake",
    "task": 1,
    "precision": None,
    "max_total_tokens": 1000,
    "bare_decode_ms": BARE_DECODE_MS,
}
DECODE_PERIOD_S = 0.01  # what /metrics says of each decode step
DECODE_ROWS = 2.0


@dataclass(frozen=True)
class Fate:
    """What becomes of a generate request."""

    status: int = 200
    num_tokens: int | None = None  # None: as many as were asked for
    end: str = "whole"  # reset, cut, error, garbage, page, deadline, closed_port
    gap_s: float = 0.0  # before each token
    hang: bool = False  # nothing comes after the tokens until the client is gone


class FakeLlmServer:
    def __init__(
        self,
        script: Callable[[int], Fate] = lambda i: Fate(),
        *,
        info: dict[str, Any] | None = INFO,
        tokenize: str = "inputs",  # the key that /tokenize knows; "" if there is none
        has_metrics: bool = True,
        gate_at: int | None = None,
        on_request: Callable[[int], object] = lambda i: None,
    ) -> None:
        """`gate_at`: no request is answered before so many have come."""
        self._script = script
        self.info = info
        self._tokenize = tokenize
        self._has_metrics = has_metrics
        self._gate_at = gate_at
        self._on_request = on_request
        self.bodies: list[dict[str, Any]] = []
        self.warm_ups: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_tokenized = 0
        self.num_prompt_tokens = 0
        self.num_steps = 0
        self.num_hung_up = 0  # streams whose client went away
        self._running = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> FakeLlmServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing, self._gate = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._closing.wait()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._answer(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, path, headers, body = await _read_request(reader)
            await self._route(method, path, headers, body, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.num_hung_up += 1
        finally:
            writer.close()

    async def _route(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        value = json.loads(body) if body else {}
        if (method, path) == ("GET", "/info") and self.info is not None:
            _send(writer, 200, json.dumps(self.info))
        elif (method, path) == ("GET", "/metrics") and self._has_metrics:
            _send(writer, 200, self._metrics(), "text/plain")
        elif (method, path) == ("POST", "/tokenize") and self._tokenize:
            self.num_tokenized += 1
            _send(writer, 200, json.dumps(self._tokens(value)))
        elif method == "POST" and path in ("/models/llama2/generate", "/v1/completions"):
            await self._generate(value, headers, reader, writer, is_tgi="models" in path)
        else:
            _send(writer, 404, json.dumps({"error": f"no route {path}"}))

    def _tokens(self, value: dict[str, Any]) -> Any:
        words = str(value.get(self._tokenize, "")).split()
        return {"tokens": words} if self._tokenize != "inputs" else [{"text": w} for w in words]

    async def _generate(
        self,
        value: dict[str, Any],
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_tgi: bool,
    ) -> None:
        if headers["x-request-id"].endswith("--1"):
            self.warm_ups.append(value)
            self._on_request(-1)
            fate = self._script(-1)
        else:
            index = int(headers["x-request-id"].rpartition("-")[2])
            self.bodies.append(value)
            self.headers.append(headers)
            self._on_request(index)
            if self._gate_at is not None:
                if len(self.bodies) == self._gate_at:
                    self._gate.set()
                await self._gate.wait()
            fate = self._script(index)
        self._running += 1
        try:
            await self._follow(fate, value, headers, reader, writer, is_tgi=is_tgi)
        finally:
            self._running -= 1

    async def _follow(
        self,
        fate: Fate,
        value: dict[str, Any],
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_tgi: bool,
    ) -> None:
        prompt, asked = _asked(value, is_tgi=is_tgi)
        stream = _Stream(writer, len(prompt.split()), is_tgi=is_tgi)
        self.num_prompt_tokens += stream.prompt_tokens
        if fate.end == "closed_port":
            self._server.close()
        if fate.status != 200:
            error = json.dumps({"error": "scripted", "error_type": "test"})
            _send(writer, fate.status, error, more="Location: /elsewhere\r\n")
            return
        if fate.end == "page":
            _send(writer, 200, "<html>", "text/html")
            return
        stream.start(headers["x-request-id"])
        can_end = fate.end in ("whole", "deadline") and not fate.hang
        num_tokens = asked if fate.num_tokens is None else fate.num_tokens
        for i in range(num_tokens):
            await asyncio.sleep(fate.gap_s)
            is_last = can_end and i == num_tokens - 1
            stream.token(i, "timeout" if fate.end == "deadline" else "length", is_last=is_last)
            await writer.drain()
        self.num_steps += num_tokens
        if fate.hang:
            await reader.read()  # until the client has gone
            raise ConnectionResetError
        await stream.end(fate.end)

    def _metrics(self) -> str:
        period = "llm_serving:step_period_seconds"
        rows = self.num_steps * DECODE_ROWS
        return "\n".join(
            [
                "# HELP vllm:num_requests_running Requests in a step",
                f'vllm:num_requests_running{{model_name="fake"}} {self._running}',
                'vllm:num_requests_waiting{model_name="fake"} 0.0',
                f'vllm:prompt_tokens_total{{model_name="fake"}} {self.num_prompt_tokens}',
                f'vllm:prefix_cache_queries_total{{model_name="fake"}} {self.num_prompt_tokens}',
                f'vllm:prefix_cache_hits_total{{model_name="fake"}} {self.num_prompt_tokens / 4}',
                f'{period}_bucket{{kind="decode",le="+Inf",model_name="fake"}} {self.num_steps}',
                f'{period}_count{{kind="decode",model_name="fake"}} {self.num_steps}',
                f'{period}_sum{{kind="decode",model_name="fake"}} '
                f"{self.num_steps * DECODE_PERIOD_S}",
                f'llm_serving:step_rows_total{{kind="decode",model_name="fake"}} {rows}',
                "",
            ]
        )


class _Stream:
    """One answer in server-sent events, chunked."""

    def __init__(self, writer: asyncio.StreamWriter, prompt_tokens: int, *, is_tgi: bool) -> None:
        self._writer = writer
        self.prompt_tokens = prompt_tokens
        self._is_tgi = is_tgi

    def start(self, request_id: str) -> None:
        self._writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\nServer-Timing: queue;dur=1.5, prefill;dur=2\r\n"
            b"Connection: close\r\nx-request-id: " + request_id.encode() + b"\r\n\r\n"
        )

    def token(self, i: int, reason: str, *, is_last: bool) -> None:
        last = reason if is_last else None
        if self._is_tgi:
            event: dict[str, Any] = {"index": i + 1, "token": {"id": i, "text": f" w{i}"}}
            event |= {"generated_text": None, "details": None}
            if is_last:
                counts = {"generated_tokens": i + 1, "prompt_tokens": self.prompt_tokens}
                timing = {"queue": 1.0, "decode": 2.0}
                event["generated_text"] = "w"
                event["details"] = {"finish_reason": reason, **counts, "timing": timing}
            self._event(event)
            return
        self._event({"choices": [{"text": f" w{i}", "finish_reason": last}], "usage": None})
        if is_last:
            counts = {"completion_tokens": i + 1, "prompt_tokens": self.prompt_tokens}
            self._event({"choices": [], "usage": counts})
            self._chunk(b"data: [DONE]\n\n")

    async def end(self, how: str) -> None:
        if how == "reset":
            await self._writer.drain()
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
            return
        if how == "error":
            self._event({"error": "scripted end", "error_type": "test"})
        elif how == "garbage":
            self._chunk(b"data: {not json\n\n")
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self._writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _asked(value: dict[str, Any], *, is_tgi: bool) -> tuple[str, int]:
    if is_tgi:
        return value["inputs"], value["parameters"]["max_new_tokens"]
    return value["prompt"], value["max_tokens"]


async def _read_request(
    reader: asyncio.StreamReader,
) -> tuple[str, str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return method, path, headers, body


def _send(
    writer: asyncio.StreamWriter,
    status: int,
    text: str,
    kind: str = "application/json",
    more: str = "",
) -> None:
    """`more`: further lines of the head."""
    data = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + more.encode() + b"Connection: close\r\n\r\n" + data)
