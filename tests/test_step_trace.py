from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_serving.metrics import MAX_TRACE_STEPS, StepMetrics
from llm_serving.metrics.steps import SHARE_WINDOW_NS
from llm_serving.step_trace import (
    AGENT_STAGES,
    MASTER_STAGES,
    MASTER_STAMPS,
    StepRecord,
    kind_of,
)

MS = 1_000_000
SECOND = 1_000 * MS
AGENT = StepRecord._fields.index("previous")
DONE = StepRecord._fields.index("done")


def record_of(
    step_id: int = 1, *, kind: int = 1, end_ms: int = 0, forward_ms: int = 9
) -> StepRecord:
    """A step that ends at `end_ms` of the clock: idle 2 ms, then 1 ms for each other stage."""
    done = 100 * SECOND + end_ms * MS
    received = done - (3 + forward_ms) * MS
    stamps = {
        "schedule": received - 9 * MS,
        "build": received - 8 * MS,
        "shm_write": received - 6 * MS,
        "frame_send": received - 5 * MS,
        "sent": received - 4 * MS,
        "previous": received - 3 * MS,
        "waiting": received - 2 * MS,
        "received": received,
        "forward": received + MS,
        "sample": received + (1 + forward_ms) * MS,
        "result_write": received + (2 + forward_ms) * MS,
        "done": done,
        "shm_read": done + 1 * MS,
        "update": done + 3 * MS,
        "publish": done + 6 * MS,
        "end": done + 10 * MS,
    }
    return StepRecord(step_id, kind, 4, 5, 3, **stamps)


def test_a_record_knows_its_stages() -> None:
    record = record_of()
    agent = dict(zip(AGENT_STAGES, record.agent_stages(), strict=True))
    assert agent == {
        "idle": 2 * MS,
        "prepare": MS,
        "forward": 9 * MS,
        "sample": MS,
        "result_write": 2 * MS,  # and sending the answer before
    }
    assert record.period == 15 * MS
    assert dict(zip(MASTER_STAGES, record.master_stages(), strict=True)) == {
        "schedule": MS,
        "build": 2 * MS,
        "shm_write": MS,
        "frame_send": MS,
        "frame_receive": MS,
        "shm_read": 2 * MS,
        "update": 3 * MS,
        "publish": 4 * MS,
    }


@given(st.lists(st.integers(0, 10**12), min_size=16, max_size=16))
def test_the_agents_stages_are_the_period_whatever_the_stamps(gaps: list[int]) -> None:
    record = StepRecord(1, 0, 1, 1, 1, *accumulate(gaps))
    assert sum(record.agent_stages()) == record.period == record.done - record.previous
    for stage, spent in zip(MASTER_STAGES, record.master_stages(), strict=True):
        begin, end = MASTER_STAMPS[stage]
        assert spent == getattr(record, end) - getattr(record, begin)


@pytest.mark.parametrize(("rows", "decoding", "kind"), [(3, 0, 0), (3, 3, 1), (3, 1, 2), (1, 1, 1)])
def test_a_step_is_of_prompts_of_new_tokens_or_of_both(rows: int, decoding: int, kind: int) -> None:
    assert kind_of(rows, decoding) == kind


def test_the_trace_has_the_last_steps_and_not_more_than_it_keeps() -> None:
    metrics = StepMetrics(clock_ns=lambda: 7)
    for i in range(MAX_TRACE_STEPS + 5):
        metrics.observe(record_of(i))
    trace = metrics.trace(2)
    assert (trace["now_ns"], trace["columns"]) == (7, StepRecord._fields)
    assert trace["steps"] == [record_of(MAX_TRACE_STEPS + i) for i in (3, 4)]
    everything = metrics.trace(10**9)["steps"]
    assert isinstance(everything, list)
    assert len(everything) == MAX_TRACE_STEPS
    assert metrics.trace(0)["steps"] == []


def test_the_shares_of_the_agents_time_are_those_of_the_last_ten_seconds() -> None:
    now = 100 * SECOND
    metrics = StepMetrics(clock_ns=lambda: now)
    assert metrics.shares() == {"forward": 0.0, "other": 0.0, "idle": 1.0}
    metrics.observe(record_of(end_ms=-30_000))  # long ago
    metrics.observe(record_of(end_ms=-4_000, forward_ms=2_500))
    metrics.observe(record_of(end_ms=-100, forward_ms=2_500))
    shares = metrics.shares()
    assert shares["forward"] == pytest.approx(0.5)
    assert shares["other"] == pytest.approx(2 * 4 / 10_000)  # prepare, sample, write, answer
    assert sum(shares.values()) == pytest.approx(1)


def test_steps_so_short_that_ten_seconds_are_not_kept_are_shares_of_what_is() -> None:
    metrics = StepMetrics(clock_ns=lambda: 100 * SECOND)
    record = record_of(forward_ms=2)  # of 8 ms, 2 of which are idle
    fields, stamps = record[:5], record[5:]
    for i in reversed(range(2 * MAX_TRACE_STEPS)):  # 2 ms each, no pauses: 8.2 s are kept
        end = record.done - i * 2 * MS
        metrics.observe(StepRecord(*fields, *(end + (at - record.done) // 4 for at in stamps)))
    shares = {"forward": 0.25, "other": 0.5, "idle": 0.25}
    assert metrics.shares() == pytest.approx(shares, abs=1e-3)


def test_a_step_that_reaches_into_the_ten_seconds_counts_for_its_part() -> None:
    metrics = StepMetrics(clock_ns=lambda: 100 * SECOND)
    metrics.observe(record_of(end_ms=1_000 - SHARE_WINDOW_NS // MS, forward_ms=1_997))
    assert metrics.shares()["forward"] == pytest.approx(0.1, rel=0.01)
