"""What does a transport log hold?  Both formats end as the same arrays.

    ours      `# llm-serving transport log, format 1, ...`, commas, a row for every call
    older     `ZeroMQ Performance Log - Transport: IPC`, columns padded with blanks, perhaps rule
              lines and a summary in words at its end

A log may be cut, appended to, or edited: a row that cannot be read is counted and the first is
remembered, a value that is missing or impossible becomes NaN.  A file without one readable row is
a ConfigError that says what it is instead.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.transport_report.lines import Layout, Row, find_layout, parse_row
from llm_serving.errors import ConfigError
from llm_serving.transport.call_log import COLUMNS

__all__ = ["BYTES", "STAGES", "FloatArray", "TransportLog", "read_transport_log"]

FloatArray = npt.NDArray[np.float64]

STAGES = ("Serialize_ms", "Send_ms", "Recv_ms", "Deserialize_ms")
BYTES = ("Sent_KB", "Recv_KB")

_VALUES = COLUMNS[2:]
_MAX_LINE_BYTES = 1 << 16
_MAX_HEAD_LINES = 200  # the columns are named in one of them
_MAX_VALUE = 1e15  # of anything: what is larger is a broken number
_REPORT_EVERY_BYTES = 1 << 22
_TITLE = re.compile(r"#? ?llm-serving transport log, format (\S+), transport: *(.*)")
_OLDER_TITLE = re.compile(r".*transport: *(\S.*)", re.IGNORECASE)
_SUMMARY = re.compile(
    r"# ?summary: calls=(\d{1,15}) requests=(\d{1,15}) seconds=(\d{1,12}\.?\d*) ended=(.+)",
    re.ASCII,
)
_RULE = " \t=-_*+|#"


@dataclass(frozen=True, slots=True)
class TransportLog:
    """Arrays with an entry for every call that was read; durations in ms, sizes in KB."""

    name: str
    transport: str
    is_older: bool  # of the fixed-width kind
    ids: npt.NDArray[np.int64]
    methods: npt.NDArray[np.str_]
    values: dict[str, FloatArray]  # by column; NaN: not known
    remarks: tuple[str, ...]  # what could not be read, in sentences
    num_requests: int | None = None
    seconds: float | None = None
    ended: str | None = None  # None: no summary

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: npt.NDArray[np.bool_]) -> TransportLog:
        """The same log with some of its calls only."""
        values = {name: column[which] for name, column in self.values.items()}
        return replace(self, ids=self.ids[which], methods=self.methods[which], values=values)


def read_transport_log(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> TransportLog:
    """Read a log of either format; `on_progress` gets the bytes that are done, and all.

    Raises ConfigError, one sentence, for what is no log or has no call that can be read.
    """
    try:
        with path.open("rb") as file:
            return _read(str(path), file, path.stat().st_size, on_progress)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc


@dataclass(slots=True)
class _Contents:
    """What has been found so far."""

    transport: str = ""
    layout: Layout | None = None
    num_heads: int = 0  # more than one: logs were put together
    ids: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    methods: list[str] = field(default_factory=list)
    values: array[float] = field(default_factory=lambda: array("d"))  # a row after the other
    is_over: bool = False  # after a rule or a blank line behind rows, where words may follow
    is_cut: bool = False
    num_unreadable: int = 0
    first_unreadable: str = ""
    summaries: list[tuple[int, float, str]] = field(default_factory=list)


def _read(
    name: str, file: BinaryIO, size: int, on_progress: Callable[[int, int], None]
) -> TransportLog:
    found, first, done, due = _Contents(), b"", 0, _REPORT_EVERY_BYTES
    for number, line in _lines(file):
        first = first or line
        if found.layout is None and b"\0" in line:
            raise ConfigError(f"{name} is a binary file, not a transport log")
        if found.layout is None and number > _MAX_HEAD_LINES:
            break
        _feed(found, name, number, line)
        done += len(line)
        if done >= due:
            due = done + _REPORT_EVERY_BYTES
            on_progress(done, size)
    if not first:
        raise ConfigError(f"{name} is empty: not even the head of a transport log is there")
    if found.layout is None:
        raise ConfigError(_no_layout(name, first, found))
    if not found.ids:
        raise ConfigError(_no_rows(name, found))
    return _as_arrays(name, found, is_older=not found.layout.is_csv)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends; an endless one comes in pieces of one number."""
    number = 1
    while line := file.readline(_MAX_LINE_BYTES):
        yield number, line
        number += line.endswith(b"\n")


def _feed(found: _Contents, name: str, number: int, raw: bytes) -> None:
    line = raw.decode("utf-8-sig", "replace").strip()
    if found.layout is None:
        _read_head(found, name, line)
        return
    if not line.strip(_RULE):
        found.is_over = bool(found.ids)
    elif line.startswith("#"):
        _read_remark(found, line)
    elif found.layout.is_csv and not raw.endswith(b"\n"):
        found.is_cut = True  # its last number may be the half of one, too
    elif isinstance(row := parse_row(line, found.layout), Row):
        found.ids.append(row.call_id)
        found.lines.append(number)
        found.methods.append(sys.intern(row.method))
        found.values.extend(row.values)
    elif layout := find_layout(line):  # another log was appended
        if not layout.missing:
            found.layout, found.is_over = layout, False
            found.num_heads += 1
    elif not raw.endswith(b"\n") and found.ids and not found.is_over:
        found.is_cut = True
    elif not (found.is_over and not found.layout.is_csv) and not _OLDER_TITLE.fullmatch(line):
        found.num_unreadable += 1
        found.first_unreadable = found.first_unreadable or f"line {number}: {row} in {_short(line)}"


def _read_head(found: _Contents, name: str, line: str) -> None:
    if title := _TITLE.match(line):
        if title[1] != "1":
            raise ConfigError(f"{name} is of format {_short(title[1])}, and only 1 is known here")
        found.transport = title[2]
    elif title := _OLDER_TITLE.fullmatch(line):
        found.transport = title[1].strip(_RULE)
    elif layout := find_layout(line):
        if layout.missing:
            raise ConfigError(f"{name} has no column {', '.join(layout.missing)}")
        found.layout = layout
        found.num_heads = 1


def _read_remark(found: _Contents, line: str) -> None:
    if summary := _SUMMARY.fullmatch(line):
        found.summaries.append((int(summary[2]), float(summary[3]), summary[4]))


def _as_arrays(name: str, found: _Contents, *, is_older: bool) -> TransportLog:
    table = np.array(found.values, dtype=np.float64).reshape(len(found.ids), len(_VALUES))
    impossible = (table < 0) | (table > _MAX_VALUE)
    remarks = tuple(_remarks(found, table, impossible))
    table[impossible] = np.nan
    runs = found.summaries
    is_complete = len(runs) == found.num_heads and not found.is_cut
    return TransportLog(
        name=name,
        transport=found.transport or "unknown",
        is_older=is_older,
        ids=np.array(found.ids, dtype=np.int64),
        methods=np.array(found.methods, dtype=np.str_),
        values={column: table[:, i].copy() for i, column in enumerate(_VALUES)},
        remarks=remarks,
        num_requests=sum(run[0] for run in runs) if is_complete else None,
        seconds=sum(run[1] for run in runs) if is_complete else None,
        ended=runs[-1][2] if is_complete else None,
    )


def _remarks(
    found: _Contents, table: FloatArray, impossible: npt.NDArray[np.bool_]
) -> Iterator[str]:
    if n := found.num_unreadable:
        of = n + len(found.ids)
        yield f"{n:,} of {of:,} rows could not be read; the first, {found.first_unreadable}"
    if n := int(impossible.sum()):
        row, column = divmod(int(impossible.argmax()), len(_VALUES))
        where = f"line {found.lines[row]}: {_VALUES[column]} = {table[row, column]:g}"
        yield f"{n:,} values are negative or absurdly large and left out; the first, {where}"
    if n := int(np.isnan(table[:, :-1]).sum()):  # a throughput follows from the others
        yield f"{n:,} values are missing: they count as 0 in the shares, and nowhere else"
    if found.is_cut:
        yield "the last line is cut and left out: the log grows still, or its writer was killed"


def _no_layout(name: str, first: bytes, found: _Contents) -> str:
    if found.transport:
        return f"{name} ends before the line that names its columns"
    begins = _short(first.decode("utf-8", "replace").strip())
    columns = ", ".join(COLUMNS[:3])
    return (
        f"{name} is no transport log: no line of it names the columns {columns} ..., and it "
        f"begins with {begins}"
    )


def _no_rows(name: str, found: _Contents) -> str:
    if found.num_unreadable:
        n = found.num_unreadable
        return f"{name}: none of its {n:,} rows could be read; the first, {found.first_unreadable}"
    if found.is_cut:
        return f"{name} is cut within its first call"
    why = f" and ended {found.summaries[-1][2]}" if found.summaries else " yet"
    return f"{name} has its header, but no call was logged{why}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
