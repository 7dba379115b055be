from __future__ import annotations

import math

import pytest

from llm_serving.diagnostics.breakdown.metrics import Change, Histogram
from llm_serving.diagnostics.breakdown.requests import requests_of, transport_of
from llm_serving.errors import ConfigError
from tests.breakdown_samples import metrics

CALLS = "llm_serving:transport_calls_total"


def buckets(stage: str, counts: dict[str, float], total: float) -> dict[str, float]:
    name = "llm_serving:request_stage_seconds"
    series = {f'{name}_bucket{{stage="{stage}",le="{le}"}}': n for le, n in counts.items()}
    return series | {f'{name}_sum{{stage="{stage}"}}': total}


def test_a_counter_counts_from_the_scrape_before() -> None:
    before = metrics({f'{CALLS}{{method="Execute",model_name="a"}}': 5})
    after = metrics(
        {
            f'{CALLS}{{method="Execute",model_name="a"}}': 12,
            f'{CALLS}{{method="Ping",model_name="a"}}': 3,
        }
    )
    change = Change(before, after)
    assert change.total(CALLS, method="Execute") == 7
    assert change.total(CALLS) == 10
    assert change.labels(CALLS, "method") == ["Execute", "Ping"]
    assert not change.was_restarted


def test_counters_that_fell_belong_to_a_new_server_and_count_from_zero() -> None:
    change = Change(metrics({"a_total": 100}), metrics({"a_total": 4}))
    assert change.was_restarted
    assert change.total("a_total") == 4


def test_a_new_server_that_has_already_counted_further_is_known_by_its_start() -> None:
    before = metrics({"a_total": 3, "process_start_time_seconds": 1000.5})
    after = metrics({"a_total": 9, "process_start_time_seconds": 2000.5})
    change = Change(before, after)
    assert change.was_restarted
    assert change.total("a_total") == 9


def test_a_gauge_may_fall() -> None:
    change = Change(metrics({"vllm:num_requests_running": 3}), metrics({"a_total": 1}))
    assert not change.was_restarted
    assert Change("", metrics({"vllm:num_requests_running": 2})).now(
        "vllm:num_requests_running"
    ) == pytest.approx(2)


def test_quantiles_spread_a_bucket_evenly() -> None:
    histogram = Histogram([1.0, 2.0, math.inf], [2, 2, 1], 9.0)
    assert histogram.mean == pytest.approx(1.8)
    assert histogram.quantile(0.2) == pytest.approx(0.5)
    assert histogram.quantile(0.6) == pytest.approx(1.5)
    assert histogram.quantile(0.99) == 2.0  # nobody knows how far above
    assert Histogram([1.0, math.inf], [0, 0], 0.0).quantile(0.5) == 0.0


def test_stages_of_other_peoples_requests_come_from_histograms() -> None:
    series = buckets("queue", {"0.1": 2, "0.2": 4, "+Inf": 4}, 0.4)
    series |= buckets("decode", {"0.1": 0, "0.2": 4, "+Inf": 4}, 0.6)
    wall = "vllm:e2e_request_latency_seconds"
    series |= {f'{wall}_bucket{{le="+Inf"}}': 4, f"{wall}_sum": 1.01}
    found = requests_of(None, Change("", metrics(series)))
    assert found is not None
    assert (found.count, found.is_exact) == (4, False)
    assert found.stages["queue"].mean == pytest.approx(100)
    assert found.stages["queue"].p50 == pytest.approx(100)
    assert found.stages["decode"].p99 == pytest.approx(199)
    assert found.wall_ms == pytest.approx(252.5)
    assert found.deviation == pytest.approx(1.0 / 1.01 - 1)
    assert found.share("queue") == pytest.approx(100 / 252.5)


def test_without_an_ended_request_there_are_no_stages() -> None:
    assert requests_of(None, Change("", metrics({"a_total": 1}))) is None


def test_transport_is_counted_for_each_step_that_ran() -> None:
    sent = 'llm_serving:transport_bytes_total{direction="sent",medium="frame"}'
    calls = {f'{CALLS}{{method="Execute"}}': 10, f'{CALLS}{{method="Ping"}}': 0}
    change = Change("", metrics({**calls, sent: 5000}))
    found = transport_of(change, 5)
    assert found is not None
    assert found.calls == {"Execute": 2}
    assert found.bytes == {("sent", "frame"): 1000}
    assert transport_of(change, 0) is None
    assert transport_of(Change("", ""), 5) is None


def test_what_is_no_exposition_is_refused() -> None:
    with pytest.raises(ConfigError, match="Prometheus"):
        Change("", "<html>not found</html>")
