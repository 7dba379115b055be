"""Which promises can a run be held to, and did it keep them?

    --slo ttft_p99:500 e2e_p90:3000 errors:0 tokens_per_s:100

LATENCY_STATISTIC (milliseconds), errors, error_rate and exec_s are upper limits; tokens_per_s,
requests_per_s and goodput (requests per second) are lower ones.  What could not be measured is
a promise that was not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from load_test.figures import Figures

__all__ = ["GOODPUT_NAMES", "SLO_NAMES", "Verdict", "check"]

GOODPUT_NAMES = ("ttft", "tpot", "e2e")
_LATENCIES = ("ttft", "tpot", "itl", "e2e", "lag")
_STATISTICS = ("mean", "p50", "p90", "p99", "max")
_AT_LEAST = ("tokens_per_s", "requests_per_s", "goodput")
_AT_MOST = ("errors", "error_rate", "exec_s")
SLO_NAMES = (
    *(f"{latency}_{statistic}" for latency in _LATENCIES for statistic in _STATISTICS),
    *_AT_MOST,
    *_AT_LEAST,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    limit: float
    value: float | None  # None: nothing was measured

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.name in _AT_LEAST else self.value <= self.limit

    @property
    def sentence(self) -> str:
        sign = ">=" if self.name in _AT_LEAST else "<="
        value = "not measured" if self.value is None else f"{self.value:.6g}"
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.name} {sign} {self.limit:g}: {verdict}, it is {value}"


def check(figures: Figures, limits: Mapping[str, float]) -> list[Verdict]:
    """The names are of SLO_NAMES."""
    return [Verdict(name, limit, _value(figures, name)) for name, limit in limits.items()]


def _value(figures: Figures, name: str) -> float | None:
    num_ended = figures.num_ok + figures.num_errors
    match name:
        case "errors":
            return figures.num_errors
        case "error_rate":
            return figures.num_errors / num_ended if num_ended else None
        case "exec_s":
            return figures.exec_s
        case "tokens_per_s":
            return figures.output_tokens_per_s
        case "requests_per_s":
            return figures.requests_per_s
        case "goodput":
            return figures.goodput.requests_per_s if figures.goodput else None
    latency, _, statistic = name.partition("_")
    spread = getattr(figures, latency)
    return None if spread is None else float(getattr(spread, statistic))
