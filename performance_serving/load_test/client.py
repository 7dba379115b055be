"""What becomes of one request?  It is sent, its stream is read to the end, and all is recorded.

Every request opens a connection of its own, as a new user does: a kept one can be closed by the
server in the moment of its use.  Whatever goes wrong becomes the record's error.  Of an exception
that is none of the network's, nothing is known here: it ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

import aiohttp

from load_test.dialects import Dialect, ErrorEvent
from load_test.results import RequestError, RequestRecord
from load_test.sse import BadEvent, EventBuffer

__all__ = ["Client", "Clock", "open_session"]

_DRAIN_S = 1.0  # for what may come after the last event
_MAX_SENTENCE = 300


class Clock:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._begin_s


def open_session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """One for all: no limit to its connections, and no deadline but those of the requests."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, ttl_dns_cache=None)
    timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        headers=headers,
        read_bufsize=2**20,
    )


_FAILURES = (aiohttp.ClientError, ConnectionError, BadEvent, ErrorEvent)


def _kind_of(exc: Exception) -> str:
    if isinstance(exc, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(exc, BadEvent):
        return "bad_stream"
    if isinstance(exc, ErrorEvent):
        return "error_event"
    broken = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)
    return "reset" if isinstance(exc, broken) else "bad_http"


class Client:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        dialect: Dialect,
        clock: Clock,
        *,
        timeout_s: float,
        name: str,
    ) -> None:
        """`name` begins the x-request-id of each request, for the server's log."""
        self._session = session
        self._url = url + dialect.path
        self._dialect = dialect
        self._clock = clock
        self._timeout_s = timeout_s
        self._name = name
        self.num_tokens = 0  # events with a token, of all requests

    async def send(self, record: RequestRecord, prompt: str) -> None:
        """Fill in the record; it has an end, unless this is cancelled."""
        body = self._dialect.body(prompt, record.asked_tokens)
        record.sent_s = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(record, body)
        except TimeoutError:
            self._lose(record, "timeout", f"no end within {self._timeout_s:g} s")
        except _FAILURES as exc:
            self._lose(record, _kind_of(exc), str(exc) or type(exc).__name__)
        finally:
            record.output_tokens = record.output_tokens or len(record.token_s)

    async def _exchange(self, record: RequestRecord, body: bytes) -> None:
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "x-request-id": f"{self._name}-{record.index}",
        }
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False
        ) as response:
            record.status = response.status
            record.request_id = response.headers.get("x-request-id")
            record.timing = _timing(response.headers.get("Server-Timing"))
            if response.status != 200:
                text = (await response.content.read(4096)).decode(errors="replace")
                sentence = f"HTTP {response.status}: {text or response.reason}"
                self._fail(record, f"http_{response.status}", sentence)
            elif "text/event-stream" not in response.headers.get("Content-Type", ""):
                what = response.headers.get("Content-Type", "nothing said")
                self._fail(record, "bad_stream", f"the answer is no event stream but {what}")
            else:
                await self._read(record, response)

    async def _read(self, record: RequestRecord, response: aiohttp.ClientResponse) -> None:
        events = EventBuffer()
        async for piece in response.content.iter_any():
            if self._take(record, events.feed(piece), self._clock()):
                if not record.is_cancelled:
                    await _drain(response)
                else:
                    response.close()
                return
        if not self._take(record, events.flush(), self._clock()):
            self._fail(record, "cut_stream", "the stream ended without its last event")

    def _take(self, record: RequestRecord, events: list[bytes], now_s: float) -> bool:
        """True when the request is over."""
        for data in events:
            seen = self._dialect.read(data, record)
            if seen.has_token:
                record.token_s.append(now_s)
                self.num_tokens += 1
            if seen.is_last:
                self._end(record, now_s)
                return True
            if len(record.token_s) == record.cancel_after:
                record.is_cancelled = True
                record.output_tokens = len(record.token_s)
                record.end_s = now_s
                return True
        return False

    def _end(self, record: RequestRecord, now_s: float) -> None:
        record.end_s = now_s
        if record.finish_reason == "timeout":
            self._fail(record, "deadline", "the server's own deadline cut the answer")
        elif not record.token_s:
            self._fail(record, "no_token", "the stream ended without a token")

    def _lose(self, record: RequestRecord, kind: str, sentence: str) -> None:
        """Something broke; it does not matter if all had come before."""
        if record.end_s is None:
            self._fail(record, kind, sentence)

    def _fail(self, record: RequestRecord, kind: str, sentence: str) -> None:
        if record.end_s is None:
            record.end_s = self._clock()
        record.error = RequestError(kind, " ".join(sentence.split())[:_MAX_SENTENCE])


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Let the server finish its answer in peace; what comes counts for nothing."""
    with suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in response.content.iter_any():
                pass


def _timing(header: str | None) -> dict[str, float] | None:
    """`a;dur=1.5, b;dur=2` of the header Server-Timing, in milliseconds."""
    stages: dict[str, float] = {}
    for entry in (header or "").split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            if parameter.startswith("dur="):
                with suppress(ValueError):
                    stages[name] = float(parameter[4:].strip('"'))
    return stages or None
