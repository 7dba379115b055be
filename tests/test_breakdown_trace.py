from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.diagnostics.breakdown.observation import TraceAnswer
from llm_serving.diagnostics.breakdown.steps import agent_shares, broken_sums
from llm_serving.diagnostics.breakdown.trace import COLUMNS, Spans, Steps, read_steps
from llm_serving.errors import ConfigError
from llm_serving.step_trace import AGENT_STAGES, MASTER_STAGES, MASTER_STAMPS, StepRecord
from tests.breakdown_samples import MS, Costs, answer_of, simulate

TINY = Costs(*(4,) * 13)  # nanoseconds, so that moments can be counted one by one

# Two steps in flight.  Times are nanoseconds; the agent idles in [0, 9] and in [31, 40], and in
# the second it waits for a master that schedules step 2 while the answer of step 1 is on its way.
OVERLAPPING = [
    StepRecord(
        *(1, 1, 1, 1, 1),
        *(0, 2, 4, 5, 7),  # schedule, build, shm_write, frame_send, sent
        *(0, 0, 9, 10, 25, 28, 30),  # previous, waiting, received, forward, sample, write, done
        *(36, 37, 41, 45),  # shm_read, update, publish, end
    ),
    StepRecord(
        *(2, 1, 1, 1, 1),
        *(20, 33, 34, 35, 36),
        *(30, 31, 40, 42, 60, 63, 64),
        *(66, 67, 68, 70),
    ),
]


def steps_of(records: Sequence[StepRecord]) -> Steps:
    steps, out_of_order = read_steps(answer_of(records))
    assert out_of_order == []
    return steps


def stages(row: Sequence[int]) -> dict[str, int]:
    return {name: int(spent) for name, spent in zip(MASTER_STAGES, row, strict=True) if spent}


def test_a_stage_is_what_the_record_says_of_it() -> None:
    records = simulate(5, seed=1)
    steps = steps_of(records)
    assert [tuple(row) for row in steps.agent.tolist()] == [r.agent_stages() for r in records]
    assert [tuple(row) for row in steps.master.tolist()] == [r.master_stages() for r in records]
    assert steps.period.tolist() == [record.period for record in records]


def test_with_one_step_in_flight_the_agent_waits_for_the_whole_master() -> None:
    steps = steps_of(simulate(3, depth=1))
    us = 1000
    assert stages(steps.waits[1]) == {
        "schedule": 200 * us,
        "build": 100 * us,
        "shm_write": 50 * us,
        "frame_send": 30 * us,
        "frame_receive": 40 * us,  # 20 more were on the way while the agent still sent
        "shm_read": 25 * us,
        "update": 80 * us,
        "publish": 300 * us,
    }
    assert steps.on_the_way[1] == 10 * us  # of the frame's 40, sending takes the first 30
    assert steps.agent[1, 0] == 835 * us
    assert stages(steps.exposed[1]) == stages(steps.waits[1])
    assert stages(steps.master[1] - steps.exposed[1]) == {"frame_receive": 20 * us}


def test_with_two_steps_in_flight_the_master_is_hidden() -> None:
    steps = steps_of(simulate(5, depth=2))
    assert steps.agent[1:, 0].tolist() == [0, 0, 0, 0]
    assert steps.exposed[2:].sum() == 0
    assert steps.exposed[0].sum() == 380_000  # nothing runs beside which it could be hidden
    assert stages(steps.exposed[1]) == {"schedule": 10_000}  # the first frame is still on its way


def test_overlapping_steps_are_exposed_where_the_agent_idles_for_whichever_step() -> None:
    steps = steps_of(OVERLAPPING)
    assert stages(steps.exposed[0]) == {
        "schedule": 2,
        "build": 2,
        "shm_write": 1,
        "frame_send": 2,
        "frame_receive": 5,  # 31 .. 36
        "shm_read": 1,
        "update": 3,  # 37 .. 40, and one more beside the next forward
    }
    assert stages(steps.exposed[1]) == {
        "schedule": 2,  # 31 .. 33, eleven more beside the forward of step 1
        "build": 1,
        "shm_write": 1,
        "frame_send": 1,
    }


def test_what_two_stages_cover_is_counted_for_both_and_known() -> None:
    steps = steps_of(OVERLAPPING)
    waits = {"schedule": 2, "build": 1, "shm_write": 1, "frame_send": 1}
    assert stages(steps.waits[1]) == waits | {"frame_receive": 5, "shm_read": 1, "update": 3}
    assert steps.at_once.tolist() == [0, 5]  # the answer was on its way for all of step 2's making
    assert steps.on_the_way.tolist() == [2, 0]  # 7 .. 9


def test_the_masters_work_while_an_answer_is_sent_is_known() -> None:
    steps = steps_of(OVERLAPPING)
    assert steps.sending.tolist() == [0, 1]
    assert steps.beside_sending.tolist() == [0, 1]  # it schedules; the way of a frame is no work


class NaiveTwin:
    """Every nanosecond a member of a set."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self.idle = [set(range(r.waiting, r.received)) for r in records]
        self.stages = [
            [set(range(getattr(r, b), getattr(r, e))) for b, e in MASTER_STAMPS.values()]
            for r in records
        ]
        self.all_idle = set[int]().union(*self.idle)
        self.sending = [set(range(r.previous, r.waiting)) for r in records]

    def named(self, stage: int) -> set[int]:
        return set[int]().union(*(row[stage] for row in self.stages))

    def check(self, steps: Steps) -> None:
        count = range(len(MASTER_STAGES))
        busy = set[int]().union(*map(self.named, count))
        work = set[int]().union(
            *(self.named(s) for s in count if MASTER_STAGES[s] != "frame_receive")
        )
        for i, idle in enumerate(self.idle):
            assert steps.exposed[i].tolist() == [
                len(self.stages[i][s] & self.all_idle) for s in count
            ]
            assert steps.waits[i].tolist() == [len(idle & self.named(s)) for s in count]
            assert steps.on_the_way[i] == len(idle - busy)
            assert steps.beside_sending[i] == len(self.sending[i] & work)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sets(st.integers(0, 11), max_size=3),
)
def test_exposure_is_what_counting_every_nanosecond_gives(
    seed: int, depth: int, num_steps: int, pauses: set[int]
) -> None:
    records = simulate(
        num_steps, depth=depth, costs=TINY, seed=seed, pauses=sorted(pauses), start=0
    )
    steps = steps_of(records)
    NaiveTwin(records).check(steps)
    assert broken_sums(steps) == []
    assert (steps.waits.sum(1) - steps.at_once + steps.on_the_way == steps.agent[:, 0]).all()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))),
    st.lists(st.tuples(st.integers(-5, 45), st.integers(0, 50)), min_size=1),
)
def test_spans_are_the_union_of_what_they_are_made_of(
    made_of: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    spans = Spans(
        np.array([start for start, _ in made_of], np.int64),
        np.array([end for _, end in made_of], np.int64),
    )
    inside = set[int]().union(*(range(start, end) for start, end in made_of))
    found = spans.within(
        np.array([start for start, _ in asked], np.int64),
        np.array([start + length for start, length in asked], np.int64),
    )
    expected = [len(inside & set(range(start, start + length))) for start, length in asked]
    assert found.tolist() == expected


def test_periods_and_pauses_are_the_time_from_the_first_step_to_the_last() -> None:
    records = simulate(8, pauses=[3, 6], seed=5)
    steps = steps_of(records)
    assert (steps.pauses > 0).sum() == 2
    assert steps.period.sum() + steps.pauses.sum() == records[-1].done - records[0].previous


def test_the_agents_time_is_shared_out_whole() -> None:
    records = simulate(4, depth=1, pauses=[2])
    shares = agent_shares(steps_of(records))
    wall = records[-1].done - records[0].previous
    assert shares.seconds == pytest.approx(wall / 1e9)
    assert shares.forward == pytest.approx(4 * 40 * MS / wall)
    idle = 2 * 0.835e6 + 2 * 0.39e6  # after a pause it only waits for the step to be made
    assert shares.idle == pytest.approx(idle / wall)
    together = shares.forward + shares.other + shares.idle + shares.no_work
    assert together == pytest.approx(1)


def test_a_step_that_begins_before_the_last_has_ended_is_told() -> None:
    first, second = simulate(2)
    torn = second._replace(previous=first.done - 7)
    assert "step 2 began before the one ahead of it had ended" in broken_sums(
        steps_of([first, torn])
    )


def test_steps_with_stamps_out_of_order_are_left_out_and_named() -> None:
    records = simulate(4)
    records[2] = records[2]._replace(sample=records[2].forward - 1)
    steps, out_of_order = read_steps(answer_of(records))
    assert steps.column("step_id").tolist() == [1, 2, 4]
    assert out_of_order == [3]


def test_columns_are_found_by_their_names_in_any_order_among_others() -> None:
    records = simulate(3, seed=2)
    names = ["new", *reversed(COLUMNS)]
    rows = [[0, *reversed(record)] for record in records]
    steps, _ = read_steps(TraceAnswer(0, names, rows))
    assert steps.table.tolist() == [list(record) for record in records]


def test_a_trace_of_another_release_is_refused_by_the_column_it_lacks() -> None:
    names = [name for name in COLUMNS if name != "waiting"]
    with pytest.raises(ConfigError, match="no column 'waiting'"):
        read_steps(TraceAnswer(0, names, []))
    with pytest.raises(ConfigError, match="longer or shorter"):
        read_steps(TraceAnswer(0, list(COLUMNS), [[1, 2, 3]]))
    with pytest.raises(ConfigError, match="no clock shows"):
        read_steps(TraceAnswer(0, list(COLUMNS), [[10**30] * len(COLUMNS)]))


def test_a_trace_without_steps_is_empty() -> None:
    steps, out_of_order = read_steps(answer_of([]))
    assert (len(steps), out_of_order) == (0, [])
    assert steps.agent.shape == (0, len(AGENT_STAGES))
