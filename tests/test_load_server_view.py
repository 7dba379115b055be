from __future__ import annotations

from typing import Any

import pytest
from load_test.results import BareDecode, PrecisionDump, StepWork
from load_test.server_view import (
    bare_decode_of,
    context_of,
    dump_between,
    parse_metrics,
    running_and_waiting,
    work_between,
)

BEFORE = """
# HELP vllm:prompt_tokens_total Prompt tokens
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{model_name="a"} 100.0
vllm:prefix_cache_queries_total{model_name="a"} 100.0
vllm:prefix_cache_hits_total{model_name="a"} 90
llm_serving:step_period_seconds_bucket{kind="decode",le="0.1",model_name="a"} 7.0
llm_serving:step_period_seconds_count{kind="decode",model_name="a"} 10.0
llm_serving:step_period_seconds_sum{kind="decode",model_name="a"} 1.0
llm_serving:step_rows_total{kind="decode",model_name="a"} 10.0
vllm:num_requests_running{model_name="a"} 3.0
vllm:num_requests_running{model_name="b{c}"} 2.0 1700000000000
"""
AFTER = (
    BEFORE.replace(" 100.0", " 160.0")
    .replace(" 90\n", " 40\n")
    .replace(" 10.0", " 14.0")
    .replace(" 1.0\n", " 3.0\n")
    + 'llm_serving:step_period_seconds_count{model_name="a",kind="mixed"} 2.0\n'
    + 'llm_serving:step_period_seconds_sum{model_name="a",kind="mixed"} 0.5\n'
)


def test_counters_are_taken_as_what_they_have_grown_by() -> None:
    work = work_between(parse_metrics(BEFORE), parse_metrics(AFTER))
    assert work is not None
    assert work.prompt_tokens == 60
    assert work.prefix_queries == 60
    assert work.steps == {
        "decode": StepWork(4, 2.0, num_rows=4),
        "mixed": StepWork(2, 0.5),  # the first of its kind came during the run
    }
    assert work.preemptions is None  # it has no such counter


def test_a_counter_that_was_set_back_tells_nothing() -> None:
    work = work_between(parse_metrics(BEFORE), parse_metrics(AFTER))
    assert work is not None
    assert work.prefix_hits is None
    assert work_between(None, parse_metrics(AFTER)) is None
    assert work_between(parse_metrics(BEFORE), None) is None


def test_series_of_several_models_are_added_up() -> None:
    assert running_and_waiting(parse_metrics(BEFORE)) == (5.0, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("llamacpp:requests_processing 4\nllamacpp:requests_deferred 1\n", (4, 1)),
        ("tgi_batch_current_size 2\ntgi_queue_size 0\n", (2, 0)),
        ("vllm:num_requests_running NaN\nnonsense\n{} x\n", (None, None)),
        ("", (None, None)),
    ],
)
def test_other_servers_names_are_known_and_nonsense_is_not_told(
    text: str, told: tuple[float | None, float | None]
) -> None:
    assert running_and_waiting(parse_metrics(text)) == told


@pytest.mark.parametrize(
    ("info", "context"),
    [
        ({"max_total_tokens": 100, "max_model_len": 200}, 100),
        ({"max_model_len": 200}, 200),
        ({"max_total_tokens": "many"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_context_is_what_a_request_may_use(
    info: dict[str, Any] | None, context: int | None
) -> None:
    assert context_of(info) == context


@pytest.mark.parametrize(
    ("told", "bare"),
    [
        ({"context": 128, "rows": {"1": 4, "16": 9.5}}, BareDecode(128, {1: 4.0, 16: 9.5})),
        ({"context": 128, "rows": {}}, None),
        ({"rows": {"1": 4}}, None),
        ("fast", None),
        (None, None),
    ],
)
def test_the_bare_model_s_times_are_read_or_not_told(told: object, bare: BareDecode | None) -> None:
    assert bare_decode_of({"bare_decode_ms": told}) == bare


def test_the_files_of_the_run_are_those_that_came_in_between() -> None:
    before = {"dump_dir": "d", "num_written": 3, "num_failed": 1, "last_error": "old"}
    after = before | {"num_written": 10}
    assert dump_between(before, after) == PrecisionDump("d", 7, 0, None)
    after |= {"num_failed": 2, "last_error": "disk full"}
    assert dump_between(before, after) == PrecisionDump("d", 7, 1, "disk full")
    assert dump_between(before, None) is None
