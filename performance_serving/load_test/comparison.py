"""Is the second run faster than the first, and by how much?  Pure: two Runs in, ratios out.

A ratio is second / first, of the same statistic.  Its interval is a percentile bootstrap over
requests: if both runs sent the same requests, they are drawn in pairs, and only those that ended
well in both count; otherwise each run is drawn from on its own.  The interval knows nothing of what
differs between two runs of the same server; only more runs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from load_test.figures import figures_of
from load_test.results import RequestRecord, Run

__all__ = ["Comparison", "Ratio", "compare_runs", "doubts"]

_NUM_DRAWS = 1000
_INTERVAL = (2.5, 97.5)  # percentiles: 95 %
_SAME = ("rate", "duration_s", "burstiness", "concurrency", "seed", "ignore_eos", "cancel_rate")
_SAME_MODEL = ("model_id", "model_dtype", "weights")  # of /info

_LABELS = ("mean", "p50", "p90", "p99")
_MS = 1e3

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ratio:
    name: str
    first: float
    second: float
    low: float | None = None  # of second / first; None: a run has only one of these
    high: float | None = None
    is_more_better: bool = False

    @property
    def ratio(self) -> float | None:
        return self.second / self.first if self.first else None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return ""
        if self.low <= 1 <= self.high:
            return "no difference shown"
        return "better" if (self.low > 1) == self.is_more_better else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    ratios: list[Ratio]
    first_exec_s: float
    second_exec_s: float
    num_first: int  # requests behind the ratios
    num_second: int
    is_paired: bool
    doubts: list[str]

    @property
    def gain_percent(self) -> float | None:
        """How much less time the second took; negative: more."""
        if not self.first_exec_s:
            return None
        return (1 - self.second_exec_s / self.first_exec_s) * 100


def compare_runs(first: Run, second: Run, seed: int = 0) -> Comparison:
    is_paired = _sent(first) == _sent(second)
    a, b = ([r for r in run.requests if r.state == "ok"] for run in (first, second))
    if is_paired:
        both = {r.index for r in a} & {r.index for r in b}
        a, b = ([r for r in records if r.index in both] for records in (a, b))
    return Comparison(
        [*_latency_ratios(a, b, is_paired, seed), *_rates(first, second)],
        first.exec_s,
        second.exec_s,
        len(a),
        len(b),
        is_paired,
        doubts(first, second),
    )


def doubts(first: Run, second: Run) -> list[str]:
    """Why the two may not be comparable; one sentence each."""
    found = []
    if _sent(first) != _sent(second):
        found.append(f"the two runs did not send the same requests: {_difference(first, second)}")
    differing = [n for n in _SAME if first.options.get(n) != second.options.get(n)]
    for name in differing:
        values = f"{first.options.get(name)} and {second.options.get(name)}"
        found.append(f"{name} is not the same: {values}")
    infos = first.info or {}, second.info or {}
    for name in _SAME_MODEL:
        told = [info[name] for info in infos if name in info]
        if len(told) == 2 and told[0] != told[1]:
            found.append(f"{name} is not the same at both servers: {told[0]} and {told[1]}")
    if first.task != second.task:
        found.append(f"the task is not the same: {first.task} and {second.task}")
    if first.api != second.api:
        found.append(f"they spoke different dialects: {first.api} and {second.api}")
    for which, run in (("first", first), ("second", second)):
        if failed := sum(r.state == "error" for r in run.requests):
            requests = "request" if failed == 1 else "requests"
            found.append(f"{failed} {requests} of the {which} run failed")
        if run.is_interrupted:
            found.append(f"the {which} run was interrupted")
    if any(_is_bound_by_schedule(run) for run in (first, second)):
        found.append(
            "an Exec Time is about that of the schedule, which a faster server cannot shorten: "
            "compare the latencies, or use a higher rate"
        )
    return found


def _latency_ratios(
    a: list[RequestRecord], b: list[RequestRecord], is_paired: bool, seed: int
) -> Iterator[Ratio]:
    for name in ("ttft", "tpot", "e2e", "itl"):
        first, second = (_rows_of(records, name) for records in (a, b))
        if is_paired:  # one of a single token has no TPOT
            known = [i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x and y]
            first, second = [first[i] for i in known], [second[i] for i in known]
        values = [np.array([row for row in rows if row]) for rows in (first, second)]
        if all(v.size for v in values):
            yield from _ratios(name, values[0], values[1], is_paired, seed)


def _rows_of(records: list[RequestRecord], name: str) -> list[tuple[float, ...]]:
    """What one request adds to a latency: its value, or sum and number of its gaps; () if none."""
    if name == "itl":
        return [(sum(r.itl_s), len(r.itl_s)) if r.itl_s else () for r in records]
    values = [getattr(r, f"{name}_s") for r in records]
    return [() if value is None else (value,) for value in values]


def _ratios(
    name: str, first: _Array, second: _Array, is_paired: bool, seed: int
) -> Iterator[Ratio]:
    """A ratio and its interval for each statistic of one latency."""
    statistics = _mean_gap if name == "itl" else _mean_and_percentiles
    dice = np.random.default_rng(seed)
    drawn = []
    with np.errstate(divide="ignore", invalid="ignore"):  # all tokens can come at once
        for _ in range(_NUM_DRAWS):
            i = dice.integers(0, len(first), len(first))
            j = i if is_paired else dice.integers(0, len(second), len(second))
            drawn.append(statistics(second[j]) / statistics(first[i]))
    before, after = statistics(first) * _MS, statistics(second) * _MS
    for k, label in enumerate(_LABELS[: before.size]):
        low, high = _interval(np.array([draw[k] for draw in drawn]))
        yield Ratio(f"{name.upper()} {label}, ms", float(before[k]), float(after[k]), low, high)


def _interval(drawn: _Array) -> tuple[float | None, float | None]:
    if not (known := drawn[np.isfinite(drawn)]).size:
        return None, None
    low, high = np.percentile(known, _INTERVAL).tolist()
    return low, high


def _mean_and_percentiles(values: _Array) -> _Array:
    return np.array([values.mean(), *np.percentile(values, (50, 90, 99))])


def _mean_gap(sums_and_counts: _Array) -> _Array:
    total, count = sums_and_counts.sum(axis=0)
    return np.array([total / count])


def _rates(first: Run, second: Run) -> Iterator[Ratio]:
    a, b = figures_of(first), figures_of(second)
    yield Ratio("Exec Time, s", a.exec_s, b.exec_s)
    for name, label in (
        ("output_tokens_per_s", "output tokens/s"),
        ("requests_per_s", "requests/s"),
    ):
        yield Ratio(label, getattr(a, name), getattr(b, name), is_more_better=True)


def _sent(run: Run) -> list[tuple[int, str, int]]:
    return [(r.index, r.prompt_digest, r.asked_tokens) for r in run.requests]


def _difference(first: Run, second: Run) -> str:
    a, b = _sent(first), _sent(second)
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} of them"
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    what = "prompt" if a[i][1] != b[i][1] else "number of tokens asked for"
    return f"from request {a[i][0]} on the {what} differs"


def _is_bound_by_schedule(run: Run) -> bool:
    """Whether the last request was due near the end, as it is with a server that keeps up."""
    if run.options.get("concurrency") is not None or not run.requests or not run.exec_s:
        return False
    return run.requests[-1].scheduled_s > 0.9 * run.exec_s
