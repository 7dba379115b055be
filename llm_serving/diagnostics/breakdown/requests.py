"""What requests spent their time on, and what travelled for them.

The stages of a request come from the answers themselves where the load was ours, and then the wall
they are checked against is the client's: from sending to the last byte.  Of other people's requests
only histograms are known: their quantiles are estimates, and the wall is the server's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_serving.diagnostics.breakdown.metrics import Change
from llm_serving.diagnostics.breakdown.observation import ClientRequest, Load
from llm_serving.diagnostics.breakdown.steps import NS_PER_MS, Spread

__all__ = ["REQUEST_STAGES", "RequestFigures", "Transport", "requests_of", "transport_of"]

REQUEST_STAGES = (
    *("read", "validate", "tokenize", "queue", "prefill", "decode", "detokenize", "send"),
)
_STAGE_METRIC = "llm_serving:request_stage_seconds"
_WALL_METRIC = "vllm:e2e_request_latency_seconds"


@dataclass(frozen=True, slots=True)
class RequestFigures:
    count: int
    stages: dict[str, Spread]
    wall_ms: float  # mean
    is_exact: bool  # quantiles of values, not of histograms; the wall is the client's

    @property
    def sum_ms(self) -> float:
        return sum(stage.mean for stage in self.stages.values())

    @property
    def deviation(self) -> float:
        """How much more than the wall all stages are; 0.02 is 2 %."""
        return self.sum_ms / self.wall_ms - 1 if self.wall_ms else 0.0

    def share(self, *stages: str) -> float:
        """Of the wall."""
        named = sum(self.stages[name].mean for name in stages if name in self.stages)
        return named / self.wall_ms if self.wall_ms else 0.0


@dataclass(frozen=True, slots=True)
class Transport:
    """Per step that ran."""

    calls: dict[str, float]  # by method
    bytes: dict[tuple[str, str], float]  # by direction and medium


def requests_of(load: Load | None, change: Change) -> RequestFigures | None:
    """None if no request has ended."""
    answered = [r for r in (load.requests if load else ()) if r.error is None]
    if answered and all(r.timing for r in answered):
        return _of_answers(answered)
    return _of_histograms(change)


def _of_answers(requests: Sequence[ClientRequest]) -> RequestFigures:
    names = dict.fromkeys((*REQUEST_STAGES, *(n for r in requests for n in r.timing)))
    present = [name for name in names if any(name in r.timing for r in requests)]
    stages = {
        name: Spread.of(np.array([r.timing.get(name, 0.0) for r in requests])) for name in present
    }
    walls = [(r.end_ns - r.sent_ns) / NS_PER_MS for r in requests]
    return RequestFigures(len(requests), stages, float(np.mean(walls)), is_exact=True)


def _of_histograms(change: Change) -> RequestFigures | None:
    found = {name: change.histogram(_STAGE_METRIC, stage=name) for name in REQUEST_STAGES}
    count = max(histogram.count for histogram in found.values())
    if not count:
        return None
    stages = {
        name: Spread(
            histogram.total / count * 1e3,
            histogram.quantile(0.5) * 1e3,
            histogram.quantile(0.99) * 1e3,
        )
        for name, histogram in found.items()
    }
    wall = change.histogram(_WALL_METRIC)
    return RequestFigures(int(count), stages, wall.mean * 1e3, is_exact=False)


def transport_of(change: Change, num_steps: int) -> Transport | None:
    """None if nothing travelled, or the server does not count it."""
    calls_metric, bytes_metric = (
        "llm_serving:transport_calls_total",
        "llm_serving:transport_bytes_total",
    )
    if not num_steps or not change.knows(calls_metric):
        return None
    calls = {
        method: change.total(calls_metric, method=method) / num_steps
        for method in change.labels(calls_metric, "method")
    }
    travelled = {
        (direction, medium): change.total(bytes_metric, direction=direction, medium=medium)
        / num_steps
        for direction in change.labels(bytes_metric, "direction")
        for medium in change.labels(bytes_metric, "medium")
    }
    return Transport({k: v for k, v in calls.items() if v}, travelled)
