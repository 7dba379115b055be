"""Which figures does a run come to?  Pure; docs/benchmarking.md has the definitions in words.

Latencies are those of the requests that ended well.  A percentile interpolates linearly between
the two closest ranks (numpy's default).  Tokens that came on a failed request do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from load_test.results import BareDecode, RequestRecord, Run, ServerWork

__all__ = [
    "Figures",
    "Goodput",
    "PerToken",
    "Spread",
    "bare_decode_ms",
    "figures_of",
    "meets",
    "spread",
]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one latency, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that ended well and met every limit."""

    limits: dict[str, float]  # ttft, tpot, e2e -> milliseconds
    num_good: int
    share: float  # of the requests that ended, well or with an error
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class PerToken:
    """Where the time of a token went; None: not told by this server."""

    run_ms: float | None  # mean TPOT
    server_ms: float | None = None  # mean period of its decode steps
    bare_ms: float | None = None  # of the bare model loop, for as many rows as a step had
    rows: float | None = None  # mean rows of a decode step
    context: int | None = None  # at which the bare loop was measured
    max_bare_rows: int | None = None  # up to so many rows; beyond it bare_ms is too little
    overhead_min: float | None = None  # (run - bare) x output tokens / rows


@dataclass(frozen=True, slots=True)
class Figures:
    num_planned: int
    num_sent: int
    num_ok: int
    num_cancelled: int
    num_impossible: int
    num_unfinished: int  # after Ctrl-C; those never sent are in it
    num_clipped: int
    num_short: int  # ended well before the tokens they asked for, by an end-of-text token
    errors: dict[str, int]  # by kind
    exec_s: float
    prompt_tokens: int | None  # as the server counts
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    mean_in_flight: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    lag: Spread | None
    goodput: Goodput | None
    prefix_hit_rate: float | None  # of the prompt tokens; None: not told
    per_token: PerToken

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


def figures_of(run: Run, goodput: Mapping[str, float] | None = None) -> Figures:
    """`goodput`: limits in milliseconds for ttft, tpot, e2e; by default those of the run."""
    limits = run.options.get("goodput") if goodput is None else goodput
    states = Counter(r.state for r in run.requests)
    ok = [r for r in run.requests if r.state == "ok"]
    counted = [r for r in run.requests if r.state in ("ok", "cancelled", "unfinished")]
    output_tokens = sum(r.output_tokens for r in counted)
    tpot = spread(r.tpot_s for r in ok)
    return Figures(
        num_planned=run.num_planned,
        num_sent=sum(r.sent_s is not None for r in run.requests),
        num_ok=len(ok),
        num_cancelled=states["cancelled"],
        num_impossible=states["impossible"],
        num_unfinished=states["unfinished"] + max(0, run.num_planned - len(run.requests)),
        num_clipped=sum(r.is_clipped for r in run.requests),
        num_short=sum(r.output_tokens < r.asked_tokens for r in ok),
        errors=_errors(run.requests),
        exec_s=run.exec_s,
        prompt_tokens=_total(r.prompt_tokens for r in ok),
        output_tokens=output_tokens,
        requests_per_s=_per_s(len(ok), run),
        output_tokens_per_s=_per_s(output_tokens, run),
        mean_in_flight=_per_s(sum(_in_flight_s(r) for r in run.requests), run),
        ttft=spread(r.ttft_s for r in ok),
        tpot=tpot,
        itl=spread(gap for r in ok for gap in r.itl_s),
        e2e=spread(r.e2e_s for r in ok),
        lag=spread(r.lag_s for r in run.requests),
        goodput=_goodput(run, ok, limits) if limits else None,
        prefix_hit_rate=_hit_rate(run.work),
        per_token=_per_token(run, tpot, output_tokens),
    )


def spread(seconds: Iterable[float | None]) -> Spread | None:
    """None where there is nothing to measure; a None among the seconds is left out."""
    values = np.array([s for s in seconds if s is not None]) * 1e3
    if values.size == 0:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Spread(values.size, float(values.mean()), p50, p90, p99, float(values.max()))


def meets(request: RequestRecord, limits: Mapping[str, float]) -> bool:
    """Whether it ended well within all limits (milliseconds); one token has no TPOT to miss."""
    values = {"ttft": request.ttft_s, "tpot": request.tpot_s, "e2e": request.e2e_s}
    return request.state == "ok" and all(
        (value := values[name]) is None or value * 1e3 <= limit for name, limit in limits.items()
    )


def bare_decode_ms(bare: BareDecode, rows: float) -> float:
    """Linear between the measured numbers of rows; beyond them the nearest measured one."""
    known = sorted(bare.rows)
    return float(np.interp(rows, known, [bare.rows[n] for n in known]))


def _errors(requests: Iterable[RequestRecord]) -> dict[str, int]:
    counts = Counter(r.error.kind for r in requests if r.state == "error" and r.error)
    return dict(counts.most_common())


def _total(counts: Iterable[int | None]) -> int | None:
    known = [n for n in counts if n is not None]
    return sum(known) if known else None


def _per_s(count: float, run: Run) -> float:
    return count / run.exec_s if run.exec_s else 0.0


def _in_flight_s(request: RequestRecord) -> float:
    if request.sent_s is None or request.last_s is None:
        return 0.0
    return request.last_s - request.sent_s


def _goodput(run: Run, ok: list[RequestRecord], limits: Mapping[str, float]) -> Goodput:
    num_good = sum(meets(r, limits) for r in ok)
    num_ended = sum(r.state in ("ok", "error") for r in run.requests)
    share = num_good / num_ended if num_ended else 0.0
    return Goodput(dict(limits), num_good, share, _per_s(num_good, run))


def _hit_rate(work: ServerWork | None) -> float | None:
    if work is None or not work.prefix_queries or work.prefix_hits is None:
        return None
    return work.prefix_hits / work.prefix_queries


def _per_token(run: Run, tpot: Spread | None, output_tokens: int) -> PerToken:
    run_ms = tpot.mean if tpot else None
    decode = run.work.steps.get("decode") if run.work else None
    if decode is None or not decode.num_steps:
        return PerToken(run_ms)
    server_ms = decode.period_s / decode.num_steps * 1e3
    rows = decode.num_rows / decode.num_steps if decode.num_rows else None
    bare = run.bare_decode
    if bare is None or not bare.rows or rows is None:
        return PerToken(run_ms, server_ms, rows=rows)
    bare_ms = bare_decode_ms(bare, rows)
    overhead = None if run_ms is None else (run_ms - bare_ms) * output_tokens / rows / 60e3
    return PerToken(run_ms, server_ms, bare_ms, rows, bare.context, max(bare.rows), overhead)
