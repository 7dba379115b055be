"""What do the calls of a log add up to?  Figures only; nothing here prints.

Shares are of the summed Total.  What Total has beyond the four stages is Other: the peer's own
work and its being busy with earlier calls.  So the shares of the stages and of Other are 100 %;
where the stages exceed Total, which a sound log never shows, they are shares of the stages' sum.
A value that is not known counts as 0 in a share and is left out everywhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.transport_report.log import BYTES, STAGES, FloatArray, TransportLog

__all__ = [
    "OTHER",
    "CallStatistics",
    "Spread",
    "Statistics",
    "other_ms",
    "ratio",
    "rounded_percent",
    "summarise",
]

OTHER = "Other_ms"
_NUM_EXTREMES = 5
_ROUNDING = 5e-3  # how far the stages may exceed Total before we say so
_MAX_METHODS = 12  # the rest is summed up
_HEARTBEAT = "ping"  # in any case of letters; belongs to no request


@dataclass(frozen=True, slots=True)
class Spread:
    """One column over some calls; percentiles are interpolated linearly.  NaN: no value known."""

    count: int
    total: float
    mean: float
    median: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, column: FloatArray) -> Spread:
        known = column[~np.isnan(column)]
        if not len(known):
            return cls(0, 0.0, *[math.nan] * 5)
        median, p95, p99 = np.percentile(known, [50, 95, 99]).tolist()
        total = float(known.sum())
        return cls(len(known), total, total / len(known), median, p95, p99, float(known.max()))


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Some calls of a log: all of them, or those of one method."""

    num_calls: int
    columns: dict[str, Spread]  # those of the log from Serialize on, and Other
    shares: dict[str, float]  # of STAGES and OTHER; they add up to 1, or all are NaN
    excess: float  # the stages' sum over Total where it is more, else 0
    throughput_mbps: float  # all bytes over the time of all four stages

    @property
    def transport_ms(self) -> float:
        """The four stages of a call, on average."""
        return math.fsum(self.columns[stage].total for stage in STAGES) / self.num_calls


@dataclass(frozen=True, slots=True)
class Statistics:
    overall: CallStatistics
    work: CallStatistics | None  # without pings, which are transport and nothing else
    by_method: dict[str, CallStatistics]  # the one with the largest sum of Total first
    slowest: list[int]  # places in the log, by Total
    largest: list[int]  # by bytes
    num_requests: int | None
    calls_per_request: float  # without pings; NaN: the number of requests is not known, or 0
    mean_in_flight: float  # the summed Total over the seconds of the log; NaN: not known


def summarise(log: TransportLog, num_requests: int | None = None) -> Statistics:
    """`num_requests` replaces what the log's summary says."""
    overall = _of_calls(log)
    requests = log.num_requests if num_requests is None else num_requests
    works = np.char.lower(log.methods) != _HEARTBEAT
    num_work = int(np.count_nonzero(works))
    total_s = overall.columns["Total_ms"].total / 1000
    return Statistics(
        overall=overall,
        work=_of_calls(log.select(works)) if num_work else None,
        by_method=_by_method(log),
        slowest=_top(log.values["Total_ms"]),
        largest=_top(sum_of(log, BYTES)),
        num_requests=requests,
        calls_per_request=ratio(num_work, requests or 0),
        mean_in_flight=ratio(total_s, log.seconds or 0),
    )


def other_ms(log: TransportLog) -> FloatArray:
    """What Total of each call has beyond the stages; NaN where Total is not known."""
    return np.maximum(log.values["Total_ms"] - sum_of(log, STAGES), 0)


def sum_of(log: TransportLog, columns: tuple[str, ...]) -> FloatArray:
    """Of each call, what is not known being 0."""
    sums: FloatArray = np.nansum([log.values[name] for name in columns], axis=0)
    return sums


def ratio(part: float, whole: float) -> float:
    """NaN if the whole is nothing."""
    return part / whole if whole > 1e-9 else math.nan


def rounded_percent(shares: dict[str, float]) -> dict[str, float]:
    """To one decimal, and so that they still add up to 100: the largest rests are rounded up."""
    if any(map(math.isnan, shares.values())):
        return dict.fromkeys(shares, math.nan)
    tenths = {name: math.floor(share * 1000 + 1e-9) for name, share in shares.items()}
    left = 1000 - sum(tenths.values())
    by_rest = sorted(shares, key=lambda name: tenths[name] - shares[name] * 1000)
    for name in by_rest[: max(left, 0)]:
        tenths[name] += 1
    return {name: n / 10 for name, n in tenths.items()}


def _by_method(log: TransportLog) -> dict[str, CallStatistics]:
    names, which = np.unique(log.methods, return_inverse=True)
    weights = np.bincount(which, np.nan_to_num(log.values["Total_ms"]))
    order = np.argsort(-weights, kind="stable")
    kept, rest = order[:_MAX_METHODS], order[_MAX_METHODS:]
    methods = {str(names[i]): _of_calls(log.select(which == i)) for i in kept}
    if len(rest):
        methods[f"({len(rest)} others)"] = _of_calls(log.select(np.isin(which, rest)))
    return methods


def _of_calls(log: TransportLog) -> CallStatistics:
    columns = {name: Spread.of(column) for name, column in log.values.items()}
    columns[OTHER] = Spread.of(other_ms(log))
    shares, excess = _shares(log)
    moving_s = float(sum_of(log, STAGES).sum()) / 1000
    megabytes = float(sum_of(log, BYTES).sum()) / 1024
    return CallStatistics(len(log), columns, shares, excess, ratio(megabytes, moving_s))


def _shares(log: TransportLog) -> tuple[dict[str, float], float]:
    """Of the calls whose Total is known; and by how much the stages exceed it, if they do."""
    timed = log.select(~np.isnan(log.values["Total_ms"]))
    stages = {name: float(np.nansum(timed.values[name])) for name in STAGES}
    moving, total = math.fsum(stages.values()), float(timed.values["Total_ms"].sum())
    whole = max(moving, total)
    shares = {name: ratio(ms, whole) for name, ms in stages.items()}
    shares[OTHER] = ratio(whole - moving, whole)
    exceeds = moving > total * (1 + _ROUNDING)
    return shares, (ratio(moving, total) if total > 1e-9 else math.inf) if exceeds else 0.0


def _top(column: FloatArray) -> list[int]:
    """The places of the largest, ties in the order of the log."""
    known = np.flatnonzero(~np.isnan(column))
    order: npt.NDArray[np.intp] = np.argsort(-column[known], kind="stable")[:_NUM_EXTREMES]
    return [int(i) for i in known[order]]
