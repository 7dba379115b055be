"""A line for every call to an agent: how long each stage took and how many bytes travelled.

    # llm-serving transport log, format 1, transport: tcp+shm
    ID,Method,Serialize_ms,Send_ms,Recv_ms,Deserialize_ms,Total_ms,Sent_KB,Recv_KB,Throughput_MBps
    1,Execute,0.0312,0.0105,0.0871,0.0240,9.8123,1.4219,0.4102,11.724
    # summary: calls=1 requests=1 seconds=2.118 ended=normally

KB is 1024 bytes, MB is 1024 KB.  The stages are transport only: what the peer worked, and what it
was busy with before it looked at the frame, is in Total alone.  `add` costs an append; the text
is made in `flush`, and a disk that refuses it ends the log, never the caller, who is told once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from llm_serving.errors import ConfigError

__all__ = ["COLUMNS", "METHODS", "TITLE", "CallLog"]

METHODS = ("Execute", "Ping")  # those that are answered
TITLE = "# llm-serving transport log, format 1, transport: "
COLUMNS = (
    "ID",
    "Method",
    "Serialize_ms",
    "Send_ms",
    "Recv_ms",
    "Deserialize_ms",
    "Total_ms",
    "Sent_KB",
    "Recv_KB",
    "Throughput_MBps",
)

_NS_PER_MS = 1e6
_KB = 1024
_ROW = "%d,%s" + ",%.4f" * 7 + ",%.3f\n"


class CallLog:
    def __init__(
        self,
        path: Path,
        *,
        transport: str,
        methods: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Begin a new file, with an old log of that name gone; None stands for all methods.

        `on_failure` gets a sentence when the file can no longer be written.
        Raises ConfigError if that is impossible, or would overwrite what is no transport log.
        """
        self._methods = frozenset(METHODS if methods is None else methods)
        unknown = sorted(self._methods - set(METHODS))
        if unknown or not self._methods:
            wrong = f"{', '.join(unknown)} is none of them" if unknown else "none is named"
            raise ConfigError(f"transport log: the methods are {', '.join(METHODS)}; {wrong}")
        _check_overwritable(path)
        try:
            self._file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as exc:
            raise ConfigError(f"transport log {path}: {exc.strerror or exc}") from exc
        self.num_requests = 0  # kept by the owner, like the next
        self.ended = "normally"  # what the summary says of the end
        self.num_calls = 0
        self.failure: str | None = None  # why nothing is written any more
        self._clock = clock
        self._on_failure: Callable[[str], None] = lambda _: None  # until the head is written
        self._began = clock()
        self._pending: list[tuple[str, tuple[int, ...]]] = []
        self._write(f"{TITLE}{_one_line(transport)}\n{','.join(COLUMNS)}\n")
        if self.failure is not None:
            raise ConfigError(f"transport log {path}: {self.failure}")
        self._on_failure = on_failure

    def __enter__(self) -> CallLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            self.ended = kind.__name__
        self.close()

    def add(
        self,
        method: str,
        *,
        begin_ns: int,
        encoded_ns: int,
        sent_ns: int,
        arrived_ns: int,
        decoded_ns: int,
        peer_waiting_ns: int,
        peer_received_ns: int,
        peer_done_ns: int,
        sent_bytes: int,
        received_bytes: int,
    ) -> None:
        """Remember a call, if its method was asked for; all stamps are of one monotonic clock.

        `peer_waiting_ns` is when the peer was done with what came before and read its socket.
        """
        if method in self._methods and not self._file.closed:
            stamps = (begin_ns, encoded_ns, sent_ns, arrived_ns, decoded_ns)
            peer = (peer_waiting_ns, peer_received_ns, peer_done_ns)
            self._pending.append((method, (*stamps, *peer, sent_bytes, received_bytes)))

    def flush(self) -> None:
        """Write the calls since the last time; to be called once a second at least."""
        calls, self._pending = self._pending, []
        lines = [_format(self.num_calls + i, *call) for i, call in enumerate(calls, 1)]
        self.num_calls += len(calls)
        if lines:
            self._write("".join(lines))

    def close(self) -> None:
        """Write what is left and the summary.  Again: no effect."""
        self.flush()
        seconds = self._clock() - self._began
        self._write(
            f"# summary: calls={self.num_calls} requests={self.num_requests} "
            f"seconds={seconds:.3f} ended={_one_line(self.ended)}\n"
        )
        if not self._file.closed:
            self._file.close()

    def _write(self, text: str) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as exc:
            self.failure = exc.strerror or str(exc)
            with suppress(OSError):  # closing tries once more to write the rest
                self._file.close()
            self._on_failure(f"transport log {self._file.name}: {self.failure}; it ends here")


def _check_overwritable(path: Path) -> None:
    try:
        if not path.is_file():  # new; or a pipe or a device, which nothing is lost of
            return
        with path.open("rb") as file:
            start = file.read(len(TITLE))
    except OSError as exc:
        raise ConfigError(f"transport log {path}: {exc.strerror or exc}") from exc
    if start and start != TITLE.encode():
        raise ConfigError(f"transport log {path}: there is another file of that name; remove it")


def _format(call_id: int, method: str, call: tuple[int, ...]) -> str:
    begin, encoded, sent, arrived, decoded, waiting, received, done, num_out, num_in = call
    sent = min(sent, received)  # the peer may have it before we are told that it is sent
    on_the_way = max(0, received - max(sent, waiting)) + arrived - done
    stages = (encoded - begin, sent - encoded, on_the_way, decoded - arrived)
    moving_s = sum(stages) / 1e9
    megabytes = (num_out + num_in) / _KB / _KB
    return _ROW % (
        call_id,
        method,
        *(ns / _NS_PER_MS for ns in (*stages, decoded - begin)),
        num_out / _KB,
        num_in / _KB,
        megabytes / moving_s if moving_s > 0 else float("nan"),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
