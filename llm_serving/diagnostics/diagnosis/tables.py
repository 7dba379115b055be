"""How a diagnosis looks to people, on a terminal and in a pipe, and to programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_serving.diagnostics.diagnosis.diagnosis import Diagnosis
from llm_serving.diagnostics.findings import Finding, exit_code, megabytes
from llm_serving.diagnostics.page import trimmed
from llm_serving.diagnostics.probes.arrays import WAYS, ArrayTiming
from llm_serving.diagnostics.probes.timings import Timing
from llm_serving.diagnostics.thresholds import THRESHOLDS

__all__ = ["as_json", "print_diagnosis"]

_STYLES = {"OK": "green", "slow": "yellow", "broken": "bold red", "skipped": "dim"}
_VERDICTS = tuple(_STYLES)
_ROUND_TRIPS = """there and back between two processes; MB/s counts both directions
shared memory: the doorbell is our frame with the reference, over the socket named
raw socket: without frames, for one of ours holds at most 16 MB"""
_ARRAYS = """a float32 array to another process, one way over TCP loopback; median us
shared memory: to encode is to write, to decode is to take a view
times: that of shared memory; too large: for a frame, which holds at most 16 MB"""


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    with trimmed(console):
        _print(diagnosis, console)


def _print(diagnosis: Diagnosis, console: Console) -> None:
    for name, findings in diagnosis.sections.items():
        _titled(console, name, _findings_table(findings))
    if diagnosis.measured.round_trips:
        _titled(console, _ROUND_TRIPS, _round_trip_table(diagnosis.measured.round_trips))
    if diagnosis.measured.arrays:
        _titled(console, _ARRAYS, _array_table(diagnosis.measured.arrays))
    for finding in diagnosis.findings:
        if finding.trace:
            console.print(Text(f"{finding.item}: broken\n{finding.trace}\n"), soft_wrap=True)
    console.print(Text(_summary(diagnosis.findings)), soft_wrap=True)


def _titled(console: Console, title: str, table: Table) -> None:
    head, *notes = title.splitlines()
    console.print(Text(head, "bold"))
    for note in notes:
        console.print(Text(f"  {note}"))
    console.print(table)
    console.print()


def as_json(diagnosis: Diagnosis, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, with `about` ahead of it."""
    measured = diagnosis.measured
    trips = [
        {**asdict(t), "mb_per_s": t.mb_per_s, "mb_per_s_p99": t.mb_per_s_p99}
        for t in measured.round_trips
    ]
    return {
        **about,
        "exit_code": exit_code(diagnosis.findings),
        "sections": diagnosis.sections,
        "round_trips": trips,
        "arrays": [asdict(a) for a in measured.arrays],
        "volumes": [asdict(v) for v in measured.volumes],
        "scalars": asdict(measured.scalars) if measured.scalars else None,
        "copy_gb_per_s": measured.copy_gb_per_s,
        "thresholds": {name: asdict(t) for name, t in THRESHOLDS.items()},
    }


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False, expand=True)
    table.add_column(no_wrap=True, min_width=7)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for finding in findings:
        words = Text(finding.found)
        if finding.cure:
            words.append(f"\n-> {finding.cure}", "bold")
        table.add_row(Text(finding.verdict, _STYLES[finding.verdict]), finding.item, words)
    return table


def _round_trip_table(timings: Sequence[Timing]) -> Table:
    table = _table("way", "bytes", "rounds", "p50 us", "p99 us", "MB/s p50", "MB/s p99")
    before = ""
    for t in timings:
        if before not in ("", t.way):
            table.add_row()
        figures = (f"{t.p50_us:.0f}", f"{t.p99_us:.0f}", _rate(t.mb_per_s), _rate(t.mb_per_s_p99))
        table.add_row(t.way, megabytes(t.num_bytes), str(t.num_rounds), *figures)
        before = t.way
    return table


def _array_table(arrays: Sequence[ArrayTiming]) -> Table:
    table = _table("way", "array", "encode", "on the way", "decode", "total", "times")
    for size in dict.fromkeys(a.num_bytes for a in arrays):
        same = {a.way: a for a in arrays if a.num_bytes == size}
        for way in WAYS:
            if way not in same:
                table.add_row(way, megabytes(size), "", "", "", "too large", "")
                continue
            a = same[way]
            parts = (a.encode_us, a.transit_us, a.decode_us, a.total_us)
            times = a.total_us / same[WAYS[-1]].total_us
            table.add_row(way, megabytes(size), *(f"{us:.0f}" for us in parts), f"{times:.1f} x")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rate(mb_per_s: float) -> str:
    return f"{mb_per_s:.0f}" if mb_per_s >= 10 else f"{mb_per_s:.1f}"


def _summary(findings: Sequence[Finding]) -> str:
    counts = [sum(f.verdict == verdict for f in findings) for verdict in _VERDICTS]
    words = ", ".join(f"{n} {verdict}" for n, verdict in zip(counts, _VERDICTS, strict=True))
    if code := exit_code(findings):
        return f"{words}; exit code {code}"
    return f"{words}; exit code 0" + (": slow alone fails nothing" if counts[1] else "")
