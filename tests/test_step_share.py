"""Prompts beside decode rows: how much of a step they get, when the cost of a step is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from llm_serving.generation import FinishReason, SamplingParams
from llm_serving.master.request import Request, RequestStatus
from llm_serving.master.scheduler import Scheduler
from llm_serving.step_cost import StepCost
from tests.test_scheduler import answer, make, request, run_step, scheduled, shape

COST = StepCost(base_ms=2, row_ms=0.5, row_context_ms=0, token_ms=0.25, token_context_ms=0)
ALL = 64  # tokens of a step


def decoding(names: str = "ab", cost: StepCost | None = COST, **limits: Any) -> Scheduler:
    """Some that have their first token: alone, two of them take 2 + 2 * 0.5 = 3 ms a step."""
    usual = {"num_blocks": 4096, "max_num_batched_tokens": ALL, "max_step_stretch": 2.0}
    s = make(**usual | {"burst_tokens": 1} | limits)
    s.reckon_with(cost)
    for name in names:
        s.add(request(name, [ord(name)], max_new_tokens=500))
    run_step(s)
    return s


def long(name: str = "long", num_tokens: int = 100, **more: Any) -> Request:
    return request(name, list(range(num_tokens)), cache_salt=name.encode(), **more)


def test_a_prompt_beside_decode_rows_makes_a_step_so_many_times_longer_and_no_more() -> None:
    s = decoding()
    s.add(long())  # a plain step of all three takes 3.5 ms: 4 ms more, 16 tokens of 0.25 ms
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 16)]
    s.limits = dataclasses.replace(s.limits, max_step_stretch=3)
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 30)]


def test_one_who_decodes_while_many_wait_is_slowed_to_what_all_will_have_together() -> None:
    s = decoding("a", max_num_seqs=5)
    for name in "bcdefgh":
        s.add(long(name, 30))
    # five rows are as many as may run: twice 4.5 ms, less 2.5 ms for the one that decodes
    assert run_step(s)[0] == [("a", 1), ("b", 26)]
    assert run_step(s)[0] == [("a", 1), ("b", 4), ("c", 22)]


def test_rows_whose_ids_are_being_sampled_decode_too() -> None:
    s = decoding()
    s.add(long())
    first, second = scheduled(s), scheduled(s)
    assert shape(first) == shape(second) == [("a", 1), ("b", 1), ("long", 16)]
    assert [row.source for row in second.rows] == [0, 1, -1]


def test_long_contexts_of_decode_rows_make_room() -> None:
    s = decoding("a", StepCost(2, 0.5, 100, 0.25, 0))  # 2 tokens seen: 0.2 ms
    s.add(long())
    assert run_step(s)[0] == [("a", 1), ("long", 16)]  # 2 * 3.4 - 2.7 ms
    assert run_step(s)[0] == [("a", 1), ("long", 17)]  # 2 * 3.6 - 2.8 ms


def test_far_into_its_context_a_prompt_gets_fewer_tokens_and_no_later_one_what_is_left() -> None:
    s = decoding(cost=None, block_size=2, max_num_batched_tokens=1002)
    s.add(long(num_tokens=1500))
    assert run_step(s)[0][-1] == ("long", 1000)
    s.reckon_with(StepCost(2, 0.5, 0, 0.25, 0.5))
    s.add(long("other"))
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 6)]  # 6 * (0.25 + 1.003 * 0.5) of 5 ms
    s.finish(s.running[-1], FinishReason.ABORT)
    assert run_step(s)[0] == [
        ("a", 1),
        ("b", 1),
        ("other", 15),
    ]  # 15 * (0.25 + 0.0075 * 0.5) of 4 ms


def test_without_decode_rows_prompts_take_the_whole_step() -> None:
    s = decoding("")
    s.add(long("first"))
    s.add(long("second"))
    assert run_step(s)[0] == [("first", ALL)]
    assert run_step(s)[0] == [("first", 36), ("second", 28)]
    assert run_step(s)[0] == [("first", 1), ("second", 14)], "2 * 3 - 2.5 ms"


def test_a_burst_has_whole_steps_until_its_first_row_is_past_its_beginning() -> None:
    s = decoding("", burst_tokens=8)
    for i in range(9):
        s.add(long(f"{i}", ALL - i, max_new_tokens=99))
    for i in range(8):
        assert [r.num_new_tokens for r in s.running] == [*range(i, 0, -1)]
        assert run_step(s)[0] == [*((f"{j}", 1) for j in range(i)), (f"{i}", ALL - i)]
    assert s.running[0].num_new_tokens == 8
    assert run_step(s)[0][7:] == [("7", 1), ("8", 28)], "2 * (2 + 9 * 0.5) - (2 + 8 * 0.5) ms"


def test_a_row_is_past_its_beginning_as_soon_as_the_last_id_of_it_is_being_sampled() -> None:
    s = decoding("a", burst_tokens=8)
    for _ in range(5):
        run_step(s)
    assert s.running[0].num_new_tokens == 6
    s.add(long("burst", 3 * ALL))
    first, second, third = scheduled(s), scheduled(s), scheduled(s)
    assert shape(first) == shape(second) == [("a", 1), ("burst", ALL - 1)]
    assert shape(third) == [("a", 1), ("burst", 14)], "6 sampled and 2 in flight: 2 * 3 - 2.5 ms"


def test_a_row_that_had_begun_before_a_burst_keeps_its_pace() -> None:
    s = decoding("a", burst_tokens=8)
    for _ in range(7):
        run_step(s)
    assert s.running[0].num_new_tokens == 8
    s.add(long("burst"))
    assert run_step(s)[0] == [("a", 1), ("burst", 14)], "2 * 3 - 2.5 ms"


def test_a_prompt_gets_a_block_whatever_it_costs() -> None:
    s = decoding(cost=StepCost(2, 0.5, 0, 100, 100), block_size=4)
    s.add(long(num_tokens=10))
    s.add(long("next"))
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 4)]
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 4)]
    assert run_step(s) == ([("a", 1), ("b", 1), ("long", 2)], [7, 7, 7])
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 1), ("next", 4)]


@pytest.mark.parametrize("changed", [{"cost": None}, {"max_step_stretch": math.inf}])
def test_without_a_known_cost_or_a_limit_prompts_take_what_tokens_are_left(
    changed: dict[str, Any],
) -> None:
    s = decoding(**changed)
    s.add(long())
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", ALL - 2)]


def test_the_earliest_prompt_takes_the_share_and_nobody_is_admitted_for_nothing() -> None:
    s = decoding()
    s.add(long("first", 28))
    s.add(second := long("second"))
    idle = s.pool.num_idle
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("first", 20)]
    assert second.status is RequestStatus.WAITING
    assert s.pool.num_idle == idle - 7, "blocks for the first prompt only"
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("first", 8), ("second", 12)]
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("first", 1), ("second", 18)]


def test_a_row_with_one_token_to_go_is_a_decode_row_also_if_it_is_a_prompts() -> None:
    s = decoding(cost=StepCost(2, 0.5, 0, 100, 0), block_size=4)
    s.add(long(num_tokens=5))
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 4)]
    s.add(long("next"))
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("long", 1), ("next", 4)]


def test_a_prompt_of_higher_priority_takes_nothing_from_decode_rows() -> None:
    s = decoding()
    s.add(long(priority=-1))
    run_step(s)
    assert run_step(s)[0] == [("long", 16), ("a", 1), ("b", 1)]


def test_what_the_prefix_cache_has_is_not_paid_for() -> None:
    s = decoding()
    prompt = list(range(100))
    s.add(request("first", prompt, max_new_tokens=1))
    while len(s.running) > 2 or s.waiting:
        run_step(s)
    s.add(request("again", [*prompt[:92], *range(500, 508)]))
    assert run_step(s) == ([("a", 1), ("b", 1), ("again", 8)], [7, 7, 7])


def test_nobody_is_admitted_who_begins_where_what_is_left_is_not_enough_for_a_token() -> None:
    s = decoding("a", max_num_batched_tokens=1000)
    prompt = list(range(1000))
    s.add(request("first", prompt, max_new_tokens=1))
    while len(s.running) > 1 or s.waiting:
        run_step(s)
    s.reckon_with(StepCost(2, 0.5, 0, 0.1, 10))
    s.add(long("short", 7))  # 0.945 of 5.5 ms: a token at place 0 would fit, none at 992
    hits = [request(name, [*prompt[:992], *range(500, 508)]) for name in ("one", "two")]
    for hit in hits:
        s.add(hit)
    idle = s.pool.num_idle
    assert run_step(s)[0] == [("a", 1), ("short", 7)]
    assert [hit.status for hit in hits] == [RequestStatus.WAITING] * 2
    assert idle - s.pool.num_idle <= 4, "blocks for the short prompt and for `a` only"
    assert run_step(s)[0][2:] == [("one", 4)], "a block, as the first of all"
    assert hits[1].status is RequestStatus.WAITING


def test_what_is_computed_again_after_a_preemption_shares_like_a_prompt() -> None:
    s = decoding("abc", prefix_caching=False)
    for _ in range(40):
        run_step(s)
    s._requeue(s.running[-1])
    assert run_step(s)[0] == [("a", 1), ("b", 1), ("c", 16)]
    run_step(s)
    assert run_step(s) == ([("a", 1), ("b", 1), ("c", 10)], [7, 7, 7])


def test_rows_that_have_to_sit_out_a_step_wait_for_its_end_all_the_same() -> None:
    """With penalties a row cannot be two ids ahead of its history."""
    s = decoding("")
    s.add(Request("a", [1], SamplingParams(max_new_tokens=99, repetition_penalty=2.0)))
    first, second = scheduled(s), scheduled(s)
    s.add(long())
    assert shape(scheduled(s)) == [("long", 14)]  # 2 * 3 - 2.5 ms
    assert [len(answer(s, step)) for step in (first, second)] == [1, 1]


def test_a_suspect_that_runs_alone_has_the_whole_step() -> None:
    s = decoding(max_lost_steps=1)
    s.add(long())
    s.lose_steps([scheduled(s)])
    assert [run_step(s)[0] for _ in "ab"] == [[("a", 2)], [("b", 2)]]
    assert run_step(s)[0] == [("long", ALL)]
