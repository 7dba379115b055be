"""One HTTP request and its answer, on the bare ASGI callables.

Every answer gets its `x-request-id` and `Server-Timing` here and nowhere else.  What an endpoint
writes goes straight to the server's own `send`: no middleware stands between an event and the
socket.  Every wait for the client has a deadline.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import parse_qs

import msgspec
from starlette.types import Message, Receive, Scope, Send

from llm_serving.api.deadline import finish_within
from llm_serving.api.errors import BodyTooLarge, ClientGone, DeadlineExceeded, problem_of
from llm_serving.api.openai_errors import envelope_of
from llm_serving.api.settings import ApiSettings
from llm_serving.api.sse import encode_event

__all__ = ["JSON", "SERVER_SENT_EVENTS", "Exchange"]

JSON = b"application/json"
SERVER_SENT_EVENTS = b"text/event-stream"
MAX_ID = 128

Header = tuple[bytes, bytes]


class Exchange:
    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        settings: ApiSettings,
        retry_after_s: Callable[[], float],
    ) -> None:
        self._receive = receive
        self._send = send
        self._settings = settings
        self._retry_after_s = retry_after_s
        self._query = scope["query_string"]
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._is_head = scope["method"] == "HEAD"
        self._is_stream = False
        self.envelope = envelope_of(scope["path"])
        self.path_params: Mapping[str, str] = {}
        self.arrived_s = time.monotonic()  # the clock of the event loop, read finer
        self.received_s = self.arrived_s  # when the body was there
        self.request_id = _sane_id(self._headers.get(b"x-request-id")) or secrets.token_hex(16)
        self.has_started = False
        self.is_disconnected = False
        self._is_body_left = False

    def query(self, name: str) -> str | None:
        """The last value of a parameter of the URL."""
        values = parse_qs(self._query.decode("latin-1"), keep_blank_values=True).get(name)
        return values[-1] if values else None

    async def read_body(self) -> bytes:
        """The whole body.

        Raises BodyTooLarge after draining what still comes, DeadlineExceeded, or ClientGone.
        """
        self._is_body_left = True
        limit = self._settings.max_body_bytes
        length = self._headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            await self._refuse_body(0)
        chunks: list[bytes] = []
        size, is_more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while is_more and size <= limit:
                    chunk, is_more = await self._read_chunk()
                    size += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            limit_s = self._settings.body_timeout_s
            raise DeadlineExceeded(f"the body did not arrive within {limit_s:g} s") from None
        if size > limit:
            await self._refuse_body(size, is_more)
        self._is_body_left = False
        self.received_s = time.monotonic()
        return b"".join(chunks)

    async def watch(self) -> None:
        """Return when the client has gone away; only after the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_disconnected = True

    async def answer(
        self,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
        *,
        stages: Mapping[str, float] | None = None,
        headers: Iterable[Header] = (),
    ) -> None:
        """The whole answer at once; `stages` are milliseconds for Server-Timing."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, content_type, stages or {}, [length, *headers])
        await self.write(b"" if self._is_head else body, is_last=True)

    async def start_stream(self, stages: Mapping[str, float]) -> None:
        """Send the head of a stream of events; `write` sends them."""
        self._is_stream = True
        headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._start(200, SERVER_SENT_EVENTS, stages, headers)

    async def write(self, body: bytes, *, is_last: bool) -> None:
        """Send a piece of the answer.  Raises ClientGone if the client has stopped reading."""
        try:
            await finish_within(
                self._settings.send_timeout_s,
                self._send({"type": "http.response.body", "body": body, "more_body": not is_last}),
            )
        except TimeoutError:
            raise ClientGone from None

    async def fail(self, exc: Exception) -> None:
        """Answer with an error: its own status, or the last event of a stream under way."""
        problem = problem_of(exc, self.request_id, self._retry_after_s())
        status, body = self.envelope(problem)
        if not self.has_started:
            # what is left of a body must not be taken for the next request
            closing = [(b"connection", b"close")] if self._is_body_left else []
            answer = msgspec.json.encode(body)
            await self.answer(status, answer, headers=[*problem.headers, *closing])
        elif self._is_stream:
            await self.write(encode_event(body), is_last=True)

    async def send(self, message: Message) -> None:
        """For the web framework's own answers (documentation, 404): adds the two headers."""
        if message["type"] == "http.response.start":
            self.has_started = True
            message["headers"] = [*message.get("headers", ()), *self._own_headers({})]
        await self._send(message)

    async def _start(
        self, status: int, content_type: bytes, stages: Mapping[str, float], headers: list[Header]
    ) -> None:
        self.has_started = True
        headers = [(b"content-type", content_type), *headers, *self._own_headers(stages)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _own_headers(self, stages: Mapping[str, float]) -> list[Header]:
        total_ms = (time.monotonic() - self.arrived_s) * 1e3
        entries = [f"{name};dur={ms:.3f}" for name, ms in (*stages.items(), ("total", total_ms))]
        return [
            (b"x-request-id", self.request_id.encode()),
            (b"server-timing", ", ".join(entries).encode()),
        ]

    async def _read_chunk(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    async def _refuse_body(self, size: int, is_more: bool = True) -> None:
        """Raise BodyTooLarge, first reading what the client still writes: it may not read before.

        Not if it waits to be told to continue: then it reads already.
        """
        is_waiting = self._headers.get(b"expect", b"").lower() == b"100-continue" and size == 0
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while is_more and not is_waiting and size <= self._settings.max_drain_bytes:
                    chunk, is_more = await self._read_chunk()
                    size += len(chunk)
        except TimeoutError:
            pass
        raise BodyTooLarge(f"the body is over {self._settings.max_body_bytes} bytes")


def _sane_id(value: bytes | None) -> str | None:
    """A client's own id, if it is printable ASCII and not longer than MAX_ID."""
    if not value or len(value) > MAX_ID or not all(0x20 <= code <= 0x7E for code in value):
        return None
    return value.decode()
