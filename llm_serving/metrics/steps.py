"""Where do steps spend their time, and what travels for them?

The last steps are kept as they are, for `GET /trace`; of all there have been, histograms of every
stage.  A step costs two appends; its 14 bisections are done with those of other steps, and before
every scrape: together, for between two steps the caches are cold.  Nothing is formatted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from llm_serving.metrics.histogram import STAGE_BUCKETS, TOKEN_BUCKETS, Histogram
from llm_serving.step_trace import AGENT_STAGES, KINDS, MASTER_STAGES, StepRecord

__all__ = ["MAX_TRACE_STEPS", "StepMetrics", "Traffic"]

MAX_TRACE_STEPS = 4096
SHARE_WINDOW_NS = 10_000_000_000
_NUM_TOGETHER = 32  # steps; their bisections take a fifth of a millisecond
_STAGES = (*AGENT_STAGES, *MASTER_STAGES)
_NS = 1e-9


class Traffic(Protocol):
    """What has travelled between master and agents since the start."""

    @property
    def num_calls(self) -> dict[str, int]: ...
    @property
    def frame_bytes_sent(self) -> int: ...
    @property
    def frame_bytes_received(self) -> int: ...
    @property
    def memory_bytes_sent(self) -> int: ...
    @property
    def memory_bytes_received(self) -> int: ...


class StepMetrics:
    def __init__(
        self, traffic: Traffic | None = None, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """`clock_ns` is the clock of the records."""
        self._traffic = traffic
        self._clock_ns = clock_ns
        self._last: deque[StepRecord] = deque(maxlen=MAX_TRACE_STEPS)
        self._uncounted: list[StepRecord] = []  # not in any of the following yet
        self._stages = [[Histogram(STAGE_BUCKETS) for _ in _STAGES] for _ in KINDS]
        self._periods = [Histogram(TOKEN_BUCKETS) for _ in KINDS]
        self._num_rows = [0] * len(KINDS)
        self._num_tokens = [0] * len(KINDS)

    def observe(self, record: StepRecord) -> None:
        """A step is over, its events published."""
        self._last.append(record)
        self._uncounted.append(record)
        if len(self._uncounted) == _NUM_TOGETHER:
            self._count()

    def trace(self, num_steps: int) -> dict[str, object]:
        """The last steps, the oldest first: the body of /trace."""
        steps = list(self._last)[-num_steps:] if num_steps > 0 else []
        return {"now_ns": self._clock_ns(), "columns": StepRecord._fields, "steps": steps}

    def collect(self, names: Sequence[str], labels: Sequence[str]) -> Iterator[Metric]:
        """Everything for one scrape; `names` are the labels that all series have."""
        self._count()
        yield self._stage_family(names, labels)
        period = HistogramMetricFamily(
            "llm_serving:step_period_seconds",
            "From the end of the step before to the end of this one, in seconds; no pauses.",
            labels=(*names, "kind"),
        )
        rows = CounterMetricFamily(
            "llm_serving:step_rows", "Rows of all steps", labels=(*names, "kind")
        )
        tokens = CounterMetricFamily(
            "llm_serving:step_tokens", "Tokens computed", labels=(*names, "kind")
        )
        for kind, histogram, num_rows, num_tokens in zip(
            KINDS, self._periods, self._num_rows, self._num_tokens, strict=True
        ):
            histogram.add_to(period, (*labels, kind))
            rows.add_metric((*labels, kind), num_rows)
            tokens.add_metric((*labels, kind), num_tokens)
        yield from (period, rows, tokens)
        share = GaugeMetricFamily(
            "llm_serving:agent_time_share",
            "Share of the agent's time, 0 to 1, over the last ten seconds",
            labels=(*names, "state"),
        )
        for state, value in self.shares().items():
            share.add_metric((*labels, state), value)
        yield share
        if self._traffic is not None:
            yield from _traffic_families(self._traffic, names, labels)

    def _count(self) -> None:
        for record in self._uncounted:
            kind = record.kind
            stages = (*record.agent_stages(), *record.master_stages())
            for histogram, spent_ns in zip(self._stages[kind], stages, strict=True):
                histogram.observe(spent_ns * _NS)
            self._periods[kind].observe(record.period * _NS)
            self._num_rows[kind] += record.num_rows
            self._num_tokens[kind] += record.num_tokens
        self._uncounted.clear()

    def shares(self) -> dict[str, float]:
        """Of the agent's time over the last ten seconds: in forward, in other work, idle.

        A pause without work is idle, too.  Where steps are so short that fewer seconds are kept,
        of those.
        """
        now = self._clock_ns()
        begin = now - SHARE_WINDOW_NS
        if len(self._last) == MAX_TRACE_STEPS:
            begin = max(begin, self._last[0].previous)
        window = max(1, now - begin)
        forward = busy = 0
        for record in reversed(self._last):
            if record.done <= begin:
                break
            share = min(1.0, (record.done - begin) / max(1, record.done - record.received))
            forward += int(share * (record.sample - record.forward))
            busy += int(share * (record.done - record.received))
            busy += record.waiting - record.previous
        forward_share, busy_share = forward / window, min(1.0, busy / window)
        return {
            "forward": forward_share,
            "other": max(0.0, busy_share - forward_share),
            "idle": 1.0 - max(busy_share, forward_share),
        }

    def _stage_family(self, names: Sequence[str], labels: Sequence[str]) -> Metric:
        family = HistogramMetricFamily(
            "llm_serving:step_stage_seconds",
            "Each stage of a step, in seconds; those of the agent are its period.",
            labels=(*names, "kind", "stage"),
        )
        for kind, histograms in zip(KINDS, self._stages, strict=True):
            for stage, histogram in zip(_STAGES, histograms, strict=True):
                histogram.add_to(family, (*labels, kind, stage))
        return family


def _traffic_families(
    traffic: Traffic, names: Sequence[str], labels: Sequence[str]
) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "llm_serving:transport_calls", "Calls answered by agents", labels=(*names, "method")
    )
    for method, count in traffic.num_calls.items():
        calls.add_metric((*labels, method), count)
    yield calls
    family = CounterMetricFamily(
        "llm_serving:transport_bytes",
        "Bytes between master and agents",
        labels=(*names, "direction", "medium"),
    )
    family.add_metric((*labels, "sent", "frame"), traffic.frame_bytes_sent)
    family.add_metric((*labels, "received", "frame"), traffic.frame_bytes_received)
    family.add_metric((*labels, "sent", "shared_memory"), traffic.memory_bytes_sent)
    family.add_metric((*labels, "received", "shared_memory"), traffic.memory_bytes_received)
    yield family
