"""A wait with a deadline that costs nothing where nothing waits."""

from __future__ import annotations

import asyncio

import pytest

from llm_serving.api.deadline import finish_within


async def test_what_ends_at_once_arms_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def at_once() -> None:
        ended.append(1)

    def timeout(limit_s: float) -> None:
        raise AssertionError("a timer is armed")

    monkeypatch.setattr(asyncio, "timeout", timeout)
    await finish_within(1.0, at_once())
    assert ended


async def test_what_waits_goes_on_to_its_end() -> None:
    first, second, seen = asyncio.Event(), asyncio.Event(), []

    async def waiting() -> None:
        for event in (first, second):
            await event.wait()
            await asyncio.sleep(0)
            seen.append(event)

    task = asyncio.create_task(finish_within(20.0, waiting()))
    for event in (first, second):
        await asyncio.sleep(0)
        event.set()
    await task
    assert seen == [first, second]


async def test_what_takes_too_long_is_cancelled_and_may_clean_up() -> None:
    cleaned = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(1)

    with pytest.raises(TimeoutError):
        await finish_within(0.001, for_ever())
    assert cleaned


async def test_an_error_comes_out_whenever_it_happens() -> None:
    async def failing(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        raise KeyError("of its own")

    for turns in range(3):
        with pytest.raises(KeyError, match="of its own"):
            await finish_within(20.0, failing(turns))


async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    task = asyncio.create_task(finish_within(20.0, asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
