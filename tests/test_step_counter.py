from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest

from llm_serving.errors import ChannelError
from llm_serving.transport.step_counter import StepCount, StepCounter


@pytest.fixture
def counter() -> Iterator[StepCounter]:
    made = StepCounter.create()
    yield made
    made.close()
    assert not (pathlib.Path("/dev/shm") / made.name).exists()


def test_before_an_agent_writes_everything_is_zero(counter: StepCounter) -> None:
    assert counter.read() == StepCount()


def test_the_master_reads_what_the_agent_writes(counter: StepCounter) -> None:
    agent = StepCounter.attach(counter.name)
    agent.restart(agent_epoch=4)
    seen = [counter.read()]
    for change in (agent.begin, agent.tick, agent.tick, agent.finish, agent.begin):
        change()
        seen.append(counter.read())
    assert [(c.begun, c.ticks, c.finished) for c in seen] == [
        (0, 0, 0),
        (1, 0, 0),
        (1, 1, 0),
        (1, 2, 0),
        (1, 2, 1),
        (2, 2, 1),
    ]
    assert {(c.pid, c.agent_epoch) for c in seen} == {(os.getpid(), 4)}
    times = [c.moved_ns for c in seen]
    assert times == sorted(times)
    assert times[0] > 0
    agent.close()
    assert counter.read() == seen[-1]


def test_the_next_agent_begins_at_zero(counter: StepCounter) -> None:
    counter.restart(1)
    counter.begin()
    counter.tick()
    counter.finish()
    counter.restart(2)
    count = counter.read()
    assert (count.agent_epoch, count.begun, count.finished, count.ticks) == (2, 0, 0, 0)


def test_a_counter_that_is_not_there_is_a_channel_error() -> None:
    with pytest.raises(ChannelError, match="cannot attach"):
        StepCounter.attach("llm-serving-0-0-none")
