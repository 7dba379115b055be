from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
import numpy.typing as npt
import pytest

from llm_serving.errors import ChannelError
from llm_serving.generation import SamplingParams, TokenOutput
from llm_serving.master.async_master import AsyncMaster
from llm_serving.master.block_pool import BlockPool
from llm_serving.master.logits_sink import give_logits, wanted_samples
from llm_serving.master.request import Request
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.master.step import Row, Step
from llm_serving.testing import FakeWorker, next_token, result_of

EVERY = 3


class Sink:
    """Keeps what it is given, and has room for `room` more."""

    def __init__(self, every: int = EVERY, room: int = 1000) -> None:
        self.every = every
        self.room = room
        self.taken: dict[tuple[int, ...], npt.NDArray[np.float32]] = {}
        self.calls: list[Callable[[], None]] = []

    def take(
        self, token_ids: npt.NDArray[np.int32], position: int, logits: npt.NDArray[np.float32]
    ) -> None:
        assert position == len(token_ids) - 1
        assert tuple(token_ids) not in self.taken
        self.taken[tuple(token_ids.tolist())] = logits
        self.room -= 1

    def has_room(self) -> bool:
        return self.room > 0

    def on_room(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def make_room(self) -> None:
        self.room = 1000
        for call in self.calls:
            call()


class House:
    def __init__(self, sink: Sink, *, num_blocks: int = 64, max_tokens: int = 64) -> None:
        self.scheduler = Scheduler(
            BlockPool(num_blocks, 2), Limits(max_num_batched_tokens=max_tokens)
        )
        self.worker = FakeWorker(num_blocks, 2)
        self.open: set[str] = set()
        self.ended = asyncio.Event()
        self.master = AsyncMaster(
            self.scheduler,
            self.worker,
            self._publish,
            logits_sink=sink,
        )

    def _publish(self, outputs: list[TokenOutput]) -> None:
        self.open -= {output.request_id for output in outputs if output.finish_reason}
        if not self.open:
            self.ended.set()

    async def answer(self, prompts: dict[str, list[int]], num_new: int) -> dict[str, list[int]]:
        """All ids of each request, side by side."""
        requests = {
            name: Request(name, ids, SamplingParams(max_new_tokens=num_new))
            for name, ids in prompts.items()
        }
        self.open |= set(requests)
        self.ended.clear()
        for request in requests.values():
            self.master.submit(request)
        async with asyncio.timeout(10):
            await self.ended.wait()
        return {name: request.token_ids.view().tolist() for name, request in requests.items()}


@contextlib.asynccontextmanager
async def serving(sink: Sink, **sizes: int) -> AsyncIterator[House]:
    house = House(sink, **sizes)
    running = asyncio.create_task(house.master.run())
    await asyncio.sleep(0)  # the master finds its agent
    yield house
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def wanted_prefixes(ids: list[int], num_prompt: int, every: int = EVERY) -> set[tuple[int, ...]]:
    """What the answer to a prompt has to leave behind: one token was sampled after each."""
    places = range(num_prompt - 1, len(ids) - 1)
    return {tuple(ids[: place + 1]) for place in places if place % every == 0}


PROMPTS = {"a": [5], "b": [1, 2, 3], "c": [1, 2, 3, 4, 7], "d": list(range(11)), "e": [9, 9]}


@pytest.mark.parametrize(
    ("num_blocks", "max_tokens", "every"), [(64, 64, 3), (64, 2, 3), (12, 64, 1), (64, 64, 100)]
)
async def test_every_chosen_position_is_given_once_with_its_own_logits(
    num_blocks: int, max_tokens: int, every: int
) -> None:
    sink = Sink(every)
    async with serving(sink, num_blocks=num_blocks, max_tokens=max_tokens) as house:
        said = await house.answer(PROMPTS, num_new=7)
    wanted = [wanted_prefixes(ids, len(PROMPTS[name]), every) for name, ids in said.items()]
    assert set(sink.taken) == set().union(*wanted)
    for prefix, logits in sink.taken.items():
        assert logits.argmax() == next_token(np.array(prefix, np.int32))
    if num_blocks == 12:
        assert house.scheduler.num_preemptions > 0


async def test_a_prefix_from_the_cache_changes_nothing() -> None:
    sink = Sink()
    async with serving(sink) as house:
        await house.answer({"a": list(range(20))}, num_new=7)
        first, sink.taken = sink.taken, {}
        await house.answer({"b": list(range(20))}, num_new=7)
    assert house.scheduler.num_prefix_hits > 0
    assert set(sink.taken) == set(first)


async def test_while_the_sink_is_full_no_step_begins_and_nothing_is_lost() -> None:
    sink = Sink(every=1, room=3)
    async with serving(sink) as house:
        answering = asyncio.create_task(house.answer({"a": [5, 6]}, num_new=12))
        for _ in range(200):  # many times what twelve steps take
            await asyncio.sleep(0.0002)
        assert 3 <= len(sink.taken) <= 3 + 2  # those that were in flight
        assert not answering.done()
        sink.make_room()
        said = await answering
    assert set(sink.taken) == wanted_prefixes(said["a"], 2, every=1)


def row(start: int, num_tokens: int) -> Row:
    ids = list(range(start + num_tokens))
    return Row(Request("r", ids, SamplingParams()), start, num_tokens, 0, True)


def test_the_position_is_that_of_the_last_token_seen() -> None:
    samplers = [row(0, 101), row(100, 1), row(99, 1), row(50, 50), row(50, 51)]
    assert wanted_samples(samplers, 100) == [0, 1, 4]
    assert wanted_samples(samplers, None) == []


def test_what_was_preempted_while_it_was_computed_is_not_given() -> None:
    step = Step(1, samplers=[row(0, 7), row(0, 4)])
    step.samplers[0].request.epoch += 1
    sink = Sink()
    give_logits(step, result_of(1, [8, 9], wanted_logits=[0, 1]), sink)
    assert set(sink.taken) == {(0, 1, 2, 3)}


def test_a_result_without_the_logits_that_were_asked_for_is_refused() -> None:
    step = Step(1, samplers=[row(0, 7)])
    with pytest.raises(ChannelError, match="1 rows of logits were asked for"):
        give_logits(step, result_of(1, [8]), Sink())
