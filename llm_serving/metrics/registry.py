"""What a monitor reads at /metrics: vLLM's names, so that its dashboards work.

Counting costs a few additions on the per-token path; text is only made at a scrape, when the
gauges are read from the master, too.  There is no lock: everything runs on the event loop.
`render` holds every series from the start, at 0, so that rates can be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from llm_serving.metrics.histogram import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram
from llm_serving.metrics.steps import StepMetrics

__all__ = ["CONTENT_TYPE", "FINISHED_REASONS", "REQUEST_STAGES", "Metrics", "Stats"]

CONTENT_TYPE: str = CONTENT_TYPE_PLAIN_0_0_4
FINISHED_REASONS = ("stop", "length", "timeout", "abort", "error")
REQUEST_STAGES = (
    "read",
    "validate",
    "tokenize",
    "queue",
    "prefill",
    "decode",
    "detokenize",
    "send",
)
_LABELS = ("model_name",)


class Stats(Protocol):
    """What the master says of itself; counts are since the start."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def num_prefix_queries(self) -> int: ...
    @property
    def num_prefix_hits(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


class Metrics(Collector):
    def __init__(
        self,
        model_name: str,
        read_stats: Callable[[], Stats],
        *,
        build: Mapping[str, str] | None = None,
        steps: StepMetrics | None = None,
    ) -> None:
        """`build` becomes the labels of llm_serving_build_info: version, dtype, device, ...

        `steps` is what is known of steps, if anything is.
        """
        self._labels = (model_name,)
        self._read_stats = read_stats
        self._build = dict(build or {})
        self._steps = steps
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = dict.fromkeys(FINISHED_REASONS, 0)
        self._ttft = _seconds("time_to_first_token", "From arrival to the first token")
        self._itl = _seconds("inter_token_latency", "Between two tokens", TOKEN_BUCKETS)
        self._e2e = _seconds("e2e_request_latency", "From arrival to the last token")
        self._queue = _seconds("request_queue_time", "From submission to the first step")
        self._prefill = _seconds("request_prefill_time", "From the first step to the first token")
        self._decode = _seconds("request_decode_time", "From the first token to the last")
        self._stages = {stage: Histogram(REQUEST_BUCKETS) for stage in REQUEST_STAGES}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe_step(self, num_tokens: int, intervals_s: Sequence[float]) -> None:
        """A step has yielded so many tokens; `intervals_s` since the one before, where there is."""
        self._num_generated_tokens += num_tokens
        self._itl.observe_all(intervals_s)

    def observe_first_token(
        self, num_prompt_tokens: int, *, ttft_s: float, queue_s: float, prefill_s: float
    ) -> None:
        self._num_prompt_tokens += num_prompt_tokens
        self._ttft.observe(ttft_s)
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)

    def observe_end(self, finished_reason: str) -> None:
        """A request has ended: one of FINISHED_REASONS."""
        self._num_finished[finished_reason] += 1

    def observe_answer(self, *, e2e_s: float, decode_s: float) -> None:
        """A request has ended with all of its answer."""
        self._e2e.observe(e2e_s)
        self._decode.observe(decode_s)

    def observe_stages(self, stages_ms: Mapping[str, float]) -> None:
        """The last byte of an answer has been handed to the socket; stages of REQUEST_STAGES."""
        for stage, spent_ms in stages_ms.items():
            self._stages[stage].observe(spent_ms / 1e3)

    def render(self) -> bytes:
        """The text exposition format; serve it as CONTENT_TYPE."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        yield self._gauge("num_requests_running", "Requests in a step", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Held of all KV blocks, 0 to 1", stats.kv_usage)
        yield self._counter("prompt_tokens", "Prompt tokens", self._num_prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens", self._num_generated_tokens)
        queries, hits = stats.num_prefix_queries, stats.num_prefix_hits
        yield self._counter("prefix_cache_queries", "Tokens looked up in the cache", queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the cache", hits)
        yield self._counter("num_preemptions", "Preemptions", stats.num_preemptions)
        yield self._finished()
        for histogram in (self._ttft, self._itl, self._e2e, self._queue, self._prefill):
            yield histogram.family(self._labels)
        yield self._decode.family(self._labels)
        yield self._request_stages()
        if self._steps is not None:
            yield from self._steps.collect(_LABELS, self._labels)
        if self._build:
            yield InfoMetricFamily("llm_serving_build", "What is running", value=self._build)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _request_stages(self) -> Metric:
        family = HistogramMetricFamily(
            "llm_serving:request_stage_seconds",
            "Each stage of an answered request, in seconds; together its wall time.",
            labels=(*_LABELS, "stage"),
        )
        for stage, histogram in self._stages.items():
            histogram.add_to(family, (*self._labels, stage))
        return family

    def _finished(self) -> Metric:
        labels = (*_LABELS, "finished_reason")
        family = CounterMetricFamily("vllm:request_success", "Requests that ended", labels=labels)
        for reason, count in self._num_finished.items():
            family.add_metric((*self._labels, reason), count)
        return family


class _Seconds(Histogram):
    """A histogram that is a family of its own."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        super().__init__(bounds)
        self._name = f"vllm:{name}_seconds"
        self._text = f"{text}, in seconds."

    def family(self, labels: Sequence[str]) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=_LABELS)
        self.add_to(family, labels)
        return family


def _seconds(name: str, text: str, bounds: Sequence[float] = REQUEST_BUCKETS) -> _Seconds:
    return _Seconds(name, text, bounds)
