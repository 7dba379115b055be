"""Transport logs of both formats, made of the same calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_serving.diagnostics.transport_report.log import TransportLog, read_transport_log
from llm_serving.transport.call_log import COLUMNS, TITLE

__all__ = ["CALLS", "SUMMARY", "csv_text", "older_text", "read"]

Call = Sequence[object]  # in the order of COLUMNS

CALLS: list[Call] = [  # by hand: the stages' sums are 4, 4, 8 and 4 of 40 ms
    (1, "Execute", 1.0, 2.0, 3.0, 1.5, 12.0, 1500.0, 36.0, 204.8),
    (2, "Execute", 2.5, 1.5, 4.0, 2.5, 24.0, 500.0, 12.0, 47.62),
    (3, "Ping", 0.25, 0.25, 0.5, 0.0, 1.0, 0.0625, 0.0625, 0.122),
    (4, "Execute", 0.25, 0.25, 0.5, 0.0, 3.0, 2500.5, 12.0, 2453.613),
]
SUMMARY = "# summary: calls=4 requests=2 seconds=0.020 ended=normally\n"

_OLDER_HEAD = [
    "ID",
    "Method",
    "Serialize(ms)",
    "Send(ms)",
    "Recv(ms)",
    "Deserialize(ms)",
    "Total(ms)",
    "Sent(KB)",
    "Recv(KB)",
    "Throughput(MB/s)",
]


def csv_text(calls: Iterable[Call] = CALLS, transport: str = "tcp+shm", end: str = SUMMARY) -> str:
    rows = "".join(",".join(map(str, call)) + "\n" for call in calls)
    return f"{TITLE}{transport}\n{','.join(COLUMNS)}\n{rows}{end}"


def older_text(calls: Iterable[Call] = CALLS, transport: str = "IPC") -> str:
    """With thousands set apart, rule lines, and a summary in words at the end."""
    rule = "=" * 150
    rows = [_OLDER_HEAD, *([_older(value) for value in call] for call in calls)]
    lines = ["".join(f"{value:<20}" for value in row) for row in rows]
    head = ["", rule, f"ZeroMQ Performance Log - Transport: {transport}", rule, ""]
    end = ["-" * 150, "Summary", "4 calls in 40.0 ms", "Average Total: 10.0 ms", rule]
    return "\n".join([*head, lines[0], "-" * 150, *lines[1:], *end]) + "\n"


def read(folder: Path, text: str | bytes) -> TransportLog:
    path = folder / "transport.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_transport_log(path)


def _older(value: object) -> str:
    return f"{value:,}" if isinstance(value, float) else str(value)
