"""The server as its client sees it: what it says of itself, and one stream at a time.

Every call is a connection of its own, blocking.  A server that cannot be reached is Unavailable,
one that answers with anything but 200 an error with what it said.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from llm_serving.diagnostics.breakdown.observation import TraceAnswer
from llm_serving.errors import ConfigError, ServingError, Unavailable

__all__ = ["Server", "StreamOutcome"]

T = TypeVar("T")

_PIECE_BYTES = 1 << 16
_CONNECT_S, _SILENCE_S = 10.0, 300.0


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    sent_ns: int
    token_ns: list[int]
    end_ns: int
    details: dict[str, Any]


class Server:
    def __init__(self, url: str) -> None:
        """Raises ConfigError if it is no http://host:port."""
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        is_whole = parts.hostname and port and parts.path in ("", "/")
        if parts.scheme != "http" or not is_whole:
            raise ConfigError(f"--url: expected http://host:port, found {url!r:.100}")
        self.url = f"http://{parts.netloc}"
        self._host, self._port = parts.hostname or "", port

    def info(self) -> dict[str, Any]:
        return self._decoded("/info", dict[str, Any])

    def metrics(self) -> str:
        return self._get("/metrics").decode(errors="replace")

    def trace(self, num_steps: int) -> TraceAnswer:
        return self._decoded(f"/trace?steps={num_steps}", TraceAnswer)

    def is_on_this_machine(self) -> bool:
        """Whether its monotonic clock is ours: then nothing but this machine's start is between."""
        before = time.monotonic_ns()
        now_ns = self.trace(1).now_ns
        return before <= now_ns <= time.monotonic_ns()

    def stream(
        self, model: str, body: dict[str, Any], on_tokens: Callable[[int], None]
    ) -> StreamOutcome:
        """Send a streaming request and read it to its end; `on_tokens` hears of each piece."""
        path = f"/models/{urllib.parse.quote(model)}/generate"
        token_ns: list[int] = []
        rest = last = b""
        with self._connection() as connection:
            sent_ns = time.monotonic_ns()
            connection.request("POST", path, msgspec.json.encode({**body, "stream": True}))
            response = _checked(connection.getresponse(), path)
            while piece := response.read1(_PIECE_BYTES):
                now_ns = time.monotonic_ns()
                *events, rest = (rest + piece).split(b"\n\n")
                token_ns += [now_ns] * len(events)
                on_tokens(len(events))
                last = events[-1] if events else last
            return StreamOutcome(sent_ns, token_ns, time.monotonic_ns(), _details(last))

    def _decoded(self, path: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._get(path), type=kind)
        except msgspec.DecodeError as exc:
            raise ServingError(f"{self.url}{path} is not what a llm-serving says: {exc}") from exc

    def _get(self, path: str) -> bytes:
        with self._connection() as connection:
            connection.request("GET", path)
            return _checked(connection.getresponse(), path).read()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(_SILENCE_S)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection
        except (OSError, http.client.HTTPException) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise Unavailable(f"no server answers at {self.url}: {reason}") from exc
        finally:
            connection.close()


def _checked(response: http.client.HTTPResponse, path: str) -> http.client.HTTPResponse:
    if response.status == 200:
        return response
    said = response.read(10_000).decode(errors="replace")
    try:
        said = str(msgspec.json.decode(said)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        said = said.strip()[:200] or response.reason
    path = path.partition("?")[0]
    if response.status == 404 and path == "/trace":
        raise ServingError("the server has no /trace: it is not a llm-serving of this release")
    raise ServingError(f"{path} was answered with {response.status}: {said}")


def _details(event: bytes) -> dict[str, Any]:
    """What the last event of a stream says.  Raises ServingError if it ended otherwise."""
    try:
        said = msgspec.json.decode(event.removeprefix(b"data: "))
        if "error" in said:
            raise ServingError(f"a stream ended with an error: {said['error']}")
        return dict(said["details"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as exc:
        raise ServingError("a stream ended without its last event") from exc
