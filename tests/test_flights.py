from __future__ import annotations

import asyncio
import random
from collections import deque

import pytest

from llm_serving.errors import AgentDied, ChannelError
from llm_serving.testing import result_of
from llm_serving.worker.flights import Flight, Flights
from llm_serving.worker.traffic import Call


def flight(step_id: int, slot: int = 0) -> Flight:
    return Flight(step_id, slot, asyncio.get_running_loop().create_future(), Call(0))


async def test_a_step_is_over_when_every_rank_has_answered_it() -> None:
    flights = Flights(2)
    flights.add(flight(1))
    flights.add(flight(2))
    flights.answer(1, 1)
    flights.answer(1, 2)
    assert flights.take_over() is None
    assert (flights.owed_by(0), flights.owed_by(1)) == (2, 0)
    flights.answer(0, 1)
    over = flights.take_over()
    assert over is not None
    assert over.step_id == 1
    assert flights.take_over() is None
    assert flights.first.step_id == 2


@pytest.mark.parametrize("step_id", [0, 2, 3])
async def test_an_answer_out_of_turn_is_refused(step_id: int) -> None:
    flights = Flights(1)
    flights.add(flight(1))
    flights.add(flight(2))
    with pytest.raises(ChannelError, match=f"answered step {step_id} out of turn"):
        flights.answer(0, step_id)


async def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    flights = Flights(1)
    with pytest.raises(ChannelError, match="out of turn"):
        flights.answer(0, 0)
    flights.add(flight(1))
    flights.answer(0, 1)
    with pytest.raises(ChannelError, match="out of turn"):
        flights.answer(0, 1)


async def test_a_new_epoch_owes_nothing() -> None:
    flights = Flights(2)
    flights.add(flight(1))
    flights.answer(1, 1)
    assert [f.step_id for f in flights.take_all()] == [1]
    assert (len(flights), flights.owed_by(0), flights.owed_by(1)) == (0, 0, 0)
    flights.add(flight(2))
    flights.answer(1, 2)
    assert flights.take_over() is None


async def test_a_landing_tells_the_failure_before_the_result_and_only_who_waits() -> None:
    good, bad, unwanted = flight(1), flight(2), flight(3)
    for one in (good, bad, unwanted):
        one.result = result_of(one.step_id, [7])
    bad.failure = ChannelError("lost")
    unwanted.future.cancel()
    for one in (good, bad, unwanted):
        one.land()
        one.lose(AgentDied("too late"))
    assert good.future.result().token_ids.tolist() == [7]
    assert isinstance(bad.future.exception(), ChannelError)
    assert unwanted.future.cancelled()


@pytest.mark.parametrize("seed", range(20))
async def test_random_walks_land_every_step_once_in_order_and_none_early(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.randint(1, 4)
    flights = Flights(num_ranks)
    owed: list[deque[int]] = [deque() for _ in range(num_ranks)]
    landed, next_step = 0, 0
    for _ in range(300):
        rank = rng.randrange(num_ranks)
        if owed[rank] and rng.random() < 0.7:
            flights.answer(rank, owed[rank].popleft())
        elif len(flights) < 5:
            flights.add(flight(next_step))
            for queue in owed:
                queue.append(next_step)
            next_step += 1
        while (over := flights.take_over()) is not None:
            assert over.step_id == landed
            assert not any(landed in queue for queue in owed)
            landed += 1
        assert len(flights) == next_step - landed
        assert [flights.owed_by(r) for r in range(num_ranks)] == [len(q) for q in owed]
    assert landed > 0
