"""Which of two transport logs is the faster one, and in which stage?

Methods are compared with themselves: logs with another mix of calls have another mean for no
reason.  A ratio is the second log over the first, of the means and of the medians; below 1 the
second is faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_serving.diagnostics.transport_report.log import STAGES
from llm_serving.diagnostics.transport_report.statistics import (
    OTHER,
    CallStatistics,
    Spread,
    Statistics,
    ratio,
)

__all__ = ["TRANSPORT", "Comparison", "Pair", "compare"]

TRANSPORT = "Transport_ms"  # the four stages together
_COLUMNS = (*STAGES, OTHER, "Total_ms")
_SAME = 0.05  # ratios that are closer to 1 tell nothing


@dataclass(frozen=True, slots=True)
class Pair:
    first_mean: float
    second_mean: float
    ratio: float  # of the means; NaN: one is not known, or the first is 0
    median_ratio: float  # NaN for TRANSPORT, which has none


@dataclass(frozen=True, slots=True)
class Comparison:
    by_method: dict[str, dict[str, Pair]]  # of the methods in both, stage by stage
    only_first: list[str]
    only_second: list[str]
    verdicts: list[str]


def compare(first: Statistics, second: Statistics) -> Comparison:
    common = [name for name in first.by_method if name in second.by_method]
    by_method = {name: _pairs(first.by_method[name], second.by_method[name]) for name in common}
    return Comparison(
        by_method,
        [name for name in first.by_method if name not in second.by_method],
        [name for name in second.by_method if name not in first.by_method],
        [_verdict(name, pairs) for name, pairs in by_method.items()],
    )


def _pairs(first: CallStatistics, second: CallStatistics) -> dict[str, Pair]:
    pairs = {name: _pair(first.columns[name], second.columns[name]) for name in _COLUMNS}
    moving = (first.transport_ms, second.transport_ms)
    return pairs | {TRANSPORT: Pair(*moving, ratio(moving[1], moving[0]), math.nan)}


def _pair(first: Spread, second: Spread) -> Pair:
    of_means, of_medians = ratio(second.mean, first.mean), ratio(second.median, first.median)
    return Pair(first.mean, second.mean, of_means, of_medians)


def _verdict(method: str, pairs: dict[str, Pair]) -> str:
    moving, total = _faster(pairs[TRANSPORT].ratio), _faster(pairs["Total_ms"].ratio)
    return f"{method}: transport (the four stages): {moving}; Total: {total}"


def _faster(quotient: float) -> str:
    """In words, who is."""
    if math.isnan(quotient):
        return "cannot be compared"
    if abs(quotient - 1) < _SAME:
        return f"the same within {100 * _SAME:.0f} %"
    if quotient < 1:
        times = f"{1 / quotient:,.2f}" if quotient > 1e-3 else "over 1,000"
        return f"B is {times} times as fast"
    return f"A is {quotient:,.2f} times as fast"
