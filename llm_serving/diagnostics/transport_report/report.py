"""How do the figures of a transport log look to a person, and as JSON?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from llm_serving.diagnostics.page import Page, figure, figures
from llm_serving.diagnostics.transport_report.advice import Advice
from llm_serving.diagnostics.transport_report.comparison import TRANSPORT, Comparison
from llm_serving.diagnostics.transport_report.log import BYTES, STAGES, FloatArray, TransportLog
from llm_serving.diagnostics.transport_report.statistics import (
    OTHER,
    CallStatistics,
    Statistics,
    other_ms,
    rounded_percent,
)

__all__ = ["as_json", "print_comparison", "print_report"]

_STAGES = (*STAGES, OTHER)
_BAR, _MARK = 40, "█"  # characters
_SPREAD = ("mean", "median", "p95", "p99", "max")
_UNITS = (
    "ms: milliseconds; KB: 1024 bytes; MB: 1024 KB. Sent and Recv hold what went through shared "
    "memory. Throughput is (Sent + Recv) / (Serialize + Send + Recv + Deserialize) of a call. "
    "Percentiles are interpolated linearly."
)
_OLDER_UNITS = (
    "ms: milliseconds; KB and MB are read as 1024 bytes and 1024 KB; throughput of a call is what "
    "the log says. Percentiles are interpolated linearly."
)


def print_report(
    page: Page,
    log: TransportLog,
    statistics: Statistics,
    advice: list[Advice],
    explanations: Iterable[str],
) -> None:
    _print_head(page, log, statistics)
    _print_shares(page, statistics.overall)
    page.space()
    for sentence in explanations:
        page.say(sentence)
    _print_overall(page, statistics.overall)
    _print_by_method(page, statistics.by_method)
    _print_extremes(page, log, statistics)
    page.heading("Advice")
    for each in advice:
        page.say(f"{each.figure}: {each.sentence}.")
    if not advice:
        page.say("Nothing stands out.")
    if statistics.num_requests is None:
        page.say("Calls a request: not known; --requests N says of how many requests the log is.")
    page.heading("Units")
    page.say(_OLDER_UNITS if log.is_older else _UNITS)


def print_comparison(
    page: Page, first: TransportLog, second: TransportLog, comparison: Comparison
) -> None:
    page.heading("Comparison")
    for letter, log in (("A", first), ("B", second)):
        page.say(f"{letter} = {log.name} (transport {log.transport}, {len(log):,} calls)")
    _print_notes(page, second)
    for method, pairs in comparison.by_method.items():
        names = (*STAGES, TRANSPORT, OTHER, "Total_ms")
        rows = [pairs[name] for name in names]
        columns = [
            [_title(name) for name in names],
            figures(pair.first_mean for pair in rows),
            figures(pair.second_mean for pair in rows),
            [figure(pair.ratio, 3) for pair in rows],
            [figure(pair.median_ratio, 3) for pair in rows],
        ]
        page.table((f"{method}, ms", "A mean", "B mean", "B / A", "B / A of medians"), columns)
    page.space()
    for letter, names_there in (("A", comparison.only_first), ("B", comparison.only_second)):
        if names_there:
            page.say(f"In {letter} only: {', '.join(names_there)}.")
    for verdict in comparison.verdicts:
        page.say(f"{verdict}.")
    if not comparison.verdicts:
        page.say("No method is in both logs: nothing can be compared.")


def as_json(log: TransportLog, statistics: Statistics, advice: list[Advice]) -> dict[str, Any]:
    """What the report shows, in full precision; once encoded, what is not known is null."""
    return {
        "file": log.name,
        "transport": log.transport,
        "older_format": log.is_older,
        "seconds": log.seconds,
        "ended": log.ended,
        "remarks": log.remarks,
        "num_requests": statistics.num_requests,
        "calls_per_request": statistics.calls_per_request,
        "mean_in_flight": statistics.mean_in_flight,
        "overall": statistics.overall,
        "by_method": statistics.by_method,
        "slowest": [_call(log, i) for i in statistics.slowest],
        "largest": [_call(log, i) for i in statistics.largest],
        "advice": advice,
    }


def _call(log: TransportLog, i: int) -> dict[str, Any]:
    values = {name: float(column[i]) for name, column in log.values.items()}
    return {"ID": int(log.ids[i]), "Method": str(log.methods[i]), **values}


def _print_head(page: Page, log: TransportLog, statistics: Statistics) -> None:
    page.heading(f"Transport log {log.name}")
    kind = "older fixed-width format" if log.is_older else "format 1"
    facts = [f"transport {log.transport}", kind, f"{len(log):,} calls"]
    if statistics.num_requests is not None:
        facts.append(f"{statistics.num_requests:,} requests")
    if log.seconds is not None:
        facts.append(f"{log.seconds:,.1f} s")
    page.say(f"{'; '.join(facts)}.")
    _print_notes(page, log)


def _print_notes(page: Page, log: TransportLog) -> None:
    for remark in log.remarks:
        page.say(f"Note: {remark}.")
    if log.ended not in (None, "normally"):
        page.say(f"Note: the log ended with {log.ended}.")
    if log.ended is None and not log.is_older:
        page.say("Note: there is no summary line: the log grows still, or its writer was killed.")


def _print_shares(page: Page, overall: CallStatistics) -> None:
    percent = rounded_percent(overall.shares)
    lengths = [0 if math.isnan(p) else round(p / 100 * _BAR) for p in percent.values()]
    columns = [
        [*map(_title, percent), "all"],
        [_MARK * length for length in lengths] + [""],
        [figure(share, 1) for share in (*percent.values(), math.fsum(percent.values()))],
    ]
    page.table(("Share of Total", "", "%"), columns, left=2)


def _print_overall(page: Page, overall: CallStatistics) -> None:
    groups = {
        "Milliseconds": {_title(name): name for name in (*_STAGES, "Total_ms")},
        "Bytes": {"Sent KB": "Sent_KB", "Recv KB": "Recv_KB", "MB/s": "Throughput_MBps"},
    }
    for unit, names in groups.items():
        spreads = [overall.columns[name] for name in names.values()]
        sums = [
            "" if name == "MB/s" else figure(overall.columns[column].total, 1)
            for name, column in names.items()
        ]
        columns = [figures(getattr(spread, what) for spread in spreads) for what in _SPREAD]
        page.table((unit, "sum", *_SPREAD), [list(names), sums, *columns])
    page.space()
    page.say(f"All bytes over the time of all stages: {figure(overall.throughput_mbps, 1)} MB/s.")


def _print_by_method(page: Page, by_method: dict[str, CallStatistics]) -> None:
    names, methods = list(by_method), list(by_method.values())
    totals = [each.columns["Total_ms"] for each in methods]
    columns = [
        names,
        [f"{each.num_calls:,}" for each in methods],
        figures(total.mean for total in totals),
        figures(total.median for total in totals),
        figures(total.p99 for total in totals),
        figures(sum(e.columns[k].total for k in BYTES) / e.num_calls for e in methods),
        figures(each.throughput_mbps for each in methods),
    ]
    page.table(("By method", "calls", "Total mean", "median", "p99", "KB a call", "MB/s"), columns)
    means = [figures(each.columns[name].mean for each in methods) for name in _STAGES]
    page.table(("Mean ms", *map(_title, _STAGES)), [names, *means])
    percent = [rounded_percent(each.shares) for each in methods]
    shares = [[figure(each[name], 1) for each in percent] for name in _STAGES]
    page.table(("% of Total", *map(_title, _STAGES)), [names, *shares])


def _print_extremes(page: Page, log: TransportLog, statistics: Statistics) -> None:
    values = log.values | {OTHER: other_ms(log)}
    names = ("Total_ms", *_STAGES)
    head = ("Slowest", "Method", *map(_title, names))
    page.table(head, _calls(log, statistics.slowest, values, names), left=2)
    measures = (*BYTES, "Total_ms", "Throughput_MBps")
    columns = _calls(log, statistics.largest, values, measures)
    page.table(("Largest", "Method", "Sent KB", "Recv KB", "Total ms", "MB/s"), columns, left=2)


def _calls(
    log: TransportLog, places: list[int], values: dict[str, FloatArray], names: tuple[str, ...]
) -> list[list[str]]:
    """Columns of some calls."""
    ids = [f"ID {log.ids[i]}" for i in places]
    methods = [str(log.methods[i]) for i in places]
    return [ids, methods, *(figures(float(values[name][i]) for i in places) for name in names)]


def _title(column: str) -> str:
    return column.removesuffix("_ms").removesuffix("_KB").removesuffix("_MBps")
