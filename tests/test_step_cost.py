"""What a step is expected to cost, and the largest chunk that costs no more than so much."""

from __future__ import annotations

import math
import random

import msgspec
import pytest

from llm_serving.step_cost import StepCost

COST = StepCost(base_ms=2, row_ms=0.5, row_context_ms=1, token_ms=0.25, token_context_ms=0.5)


def test_rows_and_their_contexts_add_to_the_base() -> None:
    assert COST.decode_ms(4, 800) == pytest.approx(2 + 4 * 0.5 + 0.8)


def test_a_token_of_a_chunk_costs_more_the_more_it_sees() -> None:
    assert COST.chunk_ms(0, 40) == pytest.approx(40 * (0.25 + 0.5 * 0.020))
    assert COST.chunk_ms(8000, 40) == pytest.approx(40 * (0.25 + 0.5 * 8.020))


def test_the_largest_chunk_within_a_time_is_the_last_that_costs_no_more() -> None:
    rnd = random.Random(0)
    for _ in range(500):
        cost = StepCost(1, 1, 1, rnd.choice([0, rnd.random()]), rnd.random())
        start, ms = rnd.randrange(10_000), rnd.random() * 50
        longest = cost.tokens_within(ms, start)
        assert cost.chunk_ms(start, longest) <= ms * (1 + 1e-9)
        assert cost.chunk_ms(start, longest + 1) > ms * (1 - 1e-9)


def test_without_time_nothing_fits_and_what_costs_nothing_always_does() -> None:
    free = StepCost(1, 1, 1, 0, 0)
    assert COST.tokens_within(0, 0) == COST.tokens_within(-1, 100) == free.tokens_within(0, 0) == 0
    assert free.tokens_within(0.001, 5000) > 1_000_000
    assert msgspec.structs.replace(free, token_ms=5e-324).tokens_within(1, 0) > 1_000_000


@pytest.mark.parametrize("name", StepCost.__struct_fields__)
@pytest.mark.parametrize("ms", [-1, 1.1e9, 1e300, math.inf, math.nan])
def test_a_cost_that_no_step_has_is_not_believed(name: str, ms: float) -> None:
    word = msgspec.msgpack.encode({**msgspec.structs.asdict(COST), name: ms})
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.msgpack.decode(word, type=StepCost)


def test_the_dearest_cost_that_is_believed_can_be_reckoned_with() -> None:
    dear = StepCost(1e9, 1e9, 1e9, 1e9, 1e9)
    word = msgspec.msgpack.encode(dear)
    assert msgspec.msgpack.decode(word, type=StepCost) == dear
    assert dear.tokens_within(dear.decode_ms(64, 1 << 20), 1 << 20) == 1
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(COST), type=StepCost) == COST
