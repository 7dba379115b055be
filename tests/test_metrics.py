from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_serving.metrics import CONTENT_TYPE, FINISHED_REASONS, Metrics, StepMetrics
from llm_serving.step_trace import AGENT_STAGES, KINDS, MASTER_STAGES
from llm_serving.worker.traffic import Traffic
from tests.test_step_trace import record_of

NAMES = {
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:request_success_total": "counter",
    "llm_serving:request_stage_seconds": "histogram",
    "llm_serving:step_stage_seconds": "histogram",
    "llm_serving:step_period_seconds": "histogram",
    "llm_serving:step_rows_total": "counter",
    "llm_serving:step_tokens_total": "counter",
    "llm_serving:agent_time_share": "gauge",
    "llm_serving:transport_calls_total": "counter",
    "llm_serving:transport_bytes_total": "counter",
}


@dataclass(frozen=True)
class FakeStats:
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0


class Monitor:
    """Metrics, and what a scrape finds in them."""

    def __init__(self) -> None:
        self.stats = FakeStats()
        self.traffic = Traffic()
        self.steps = StepMetrics(self.traffic)
        self.metrics = Metrics(
            "llama2", lambda: self.stats, build={"version": "1.2"}, steps=self.steps
        )

    def __getitem__(self, name: str) -> float:
        return self.labelled(name)

    def labelled(self, name: str, **labels: str) -> float:
        wanted = {"model_name": "llama2", **labels}
        values = [
            sample.value
            for family in text_string_to_metric_families(self.metrics.render().decode())
            for sample in family.samples
            if sample.name == name and sample.labels == wanted
        ]
        assert len(values) == 1, f"{name} {wanted}: {values}"
        return values[0]


@pytest.fixture
def monitor() -> Monitor:
    return Monitor()


def test_every_name_is_there_from_the_start_with_vllms_type(monitor: Monitor) -> None:
    types = {}
    for line in monitor.metrics.render().decode().splitlines():
        if line.startswith(("# TYPE vllm:", "# TYPE llm_serving:")):
            _, _, name, kind = line.split()
            types[name] = kind
    assert types == NAMES


def test_every_series_bears_the_models_name(monitor: Monitor) -> None:
    lines = monitor.metrics.render().decode().splitlines()
    series = [line for line in lines if line.startswith("vllm:")]
    assert all('model_name="llama2"' in line for line in series)
    assert not any(line.startswith("# HELP vllm") and line.endswith("_total ") for line in lines)


def test_gauges_are_read_at_the_scrape(monitor: Monitor) -> None:
    monitor.stats = replace(monitor.stats, num_running=3, num_waiting=7, kv_usage=0.25)
    assert monitor["vllm:num_requests_running"] == 3
    assert monitor["vllm:num_requests_waiting"] == 7
    assert monitor["vllm:kv_cache_usage_perc"] == 0.25
    monitor.stats = FakeStats()
    assert monitor["vllm:num_requests_running"] == 0


def test_the_masters_counts_are_totals(monitor: Monitor) -> None:
    monitor.stats = FakeStats(num_prefix_queries=90, num_prefix_hits=48, num_preemptions=2)
    assert monitor["vllm:prefix_cache_queries_total"] == 90
    assert monitor["vllm:prefix_cache_hits_total"] == 48
    assert monitor["vllm:num_preemptions_total"] == 2


def test_tokens_are_counted_and_their_intervals_observed(monitor: Monitor) -> None:
    monitor.metrics.observe_first_token(12, ttft_s=0.04, queue_s=0.001, prefill_s=0.03)
    monitor.metrics.observe_step(3, [0.0004, 0.002])
    monitor.metrics.observe_step(2, [0.0001, 70.0])
    assert monitor["vllm:prompt_tokens_total"] == 12
    assert monitor["vllm:generation_tokens_total"] == 5
    name = "vllm:inter_token_latency_seconds"
    assert monitor[f"{name}_count"] == 4
    assert monitor[f"{name}_sum"] == pytest.approx(70.0025)
    cumulated = {"0.00025": 1, "0.0005": 2, "0.0015": 2, "0.002": 3, "10.0": 3, "+Inf": 4}
    for bound, count in cumulated.items():
        assert monitor.labelled(f"{name}_bucket", le=bound) == count


def test_the_stages_of_a_request_have_a_histogram_each(monitor: Monitor) -> None:
    monitor.metrics.observe_first_token(1, ttft_s=0.5, queue_s=0.1, prefill_s=0.375)
    monitor.metrics.observe_answer(e2e_s=2.5, decode_s=2.0)
    sums = {
        "time_to_first_token": 0.5,
        "request_queue_time": 0.1,
        "request_prefill_time": 0.375,
        "e2e_request_latency": 2.5,
        "request_decode_time": 2.0,
    }
    for name, seconds in sums.items():
        assert monitor[f"vllm:{name}_seconds_sum"] == pytest.approx(seconds)
        assert monitor[f"vllm:{name}_seconds_count"] == 1


def test_ends_are_counted_by_their_reason(monitor: Monitor) -> None:
    for reason in ("stop", "stop", "length"):
        monitor.metrics.observe_end(reason)
    counts = [
        monitor.labelled("vllm:request_success_total", finished_reason=reason)
        for reason in FINISHED_REASONS
    ]
    assert dict(zip(FINISHED_REASONS, counts, strict=True)) == {
        **dict.fromkeys(FINISHED_REASONS, 0),
        "stop": 2,
        "length": 1,
    }


def test_the_process_and_the_build_are_named(monitor: Monitor) -> None:
    text = monitor.metrics.render().decode()
    assert 'llm_serving_build_info{version="1.2"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Monitor(), Monitor()
    one.metrics.observe_end("stop")
    assert other.labelled("vllm:request_success_total", finished_reason="stop") == 0


def test_every_stage_of_a_step_is_observed_under_its_kind() -> None:
    monitor = Monitor()
    monitor.steps.observe(record_of(1, kind=0))
    monitor.steps.observe(record_of(2, kind=2))
    monitor.steps.observe(record_of(3, kind=2))
    for kind, count in zip(KINDS, (1, 0, 2), strict=True):
        assert monitor.labelled("llm_serving:step_period_seconds_count", kind=kind) == count
        period = monitor.labelled("llm_serving:step_period_seconds_sum", kind=kind)
        assert period == pytest.approx(0.015 * count)
        spent = {
            stage: monitor.labelled("llm_serving:step_stage_seconds_sum", kind=kind, stage=stage)
            for stage in (*AGENT_STAGES, *MASTER_STAGES)
        }
        assert sum(spent[stage] for stage in AGENT_STAGES) == pytest.approx(period)
        assert (spent["forward"], spent["publish"]) == pytest.approx((0.009 * count, 0.004 * count))
        assert monitor.labelled("llm_serving:step_rows_total", kind=kind) == 4 * count
        assert monitor.labelled("llm_serving:step_tokens_total", kind=kind) == 5 * count


def test_what_travels_is_told_by_method_direction_and_medium() -> None:
    monitor = Monitor()
    monitor.traffic.num_calls["Execute"] = 3
    monitor.traffic.frame_bytes_sent, monitor.traffic.frame_bytes_received = 10, 20
    monitor.traffic.memory_bytes_sent, monitor.traffic.memory_bytes_received = 30, 40
    assert monitor.labelled("llm_serving:transport_calls_total", method="Execute") == 3
    assert monitor.labelled("llm_serving:transport_calls_total", method="Ping") == 0
    for direction, medium, count in (
        ("sent", "frame", 10),
        ("received", "frame", 20),
        ("sent", "shared_memory", 30),
        ("received", "shared_memory", 40),
    ):
        name = "llm_serving:transport_bytes_total"
        assert monitor.labelled(name, direction=direction, medium=medium) == count


@pytest.mark.parametrize("num_steps", [1, 31, 32, 33, 100])
def test_every_scrape_has_every_step_so_far_once(monitor: Monitor, num_steps: int) -> None:
    for scrape in (1, 2):
        for i in range(num_steps):
            monitor.steps.observe(record_of(i, kind=1))
        tokens = monitor.labelled("llm_serving:step_tokens_total", kind="decode")
        assert tokens == scrape * num_steps * record_of(0, kind=1).num_tokens
        count = monitor.labelled("llm_serving:step_period_seconds_count", kind="decode")
        assert count == scrape * num_steps
