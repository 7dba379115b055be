"""How does a wait get a deadline, if it is hardly ever a wait?

Arming and disarming a timer costs more than sending an event to a socket that takes it at once.
So what is awaited is first run up to where it really waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any

__all__ = ["finish_within"]


async def finish_within(limit_s: float, awaitable: Awaitable[object]) -> None:
    """Await it; raises TimeoutError, having cancelled it, if that takes longer than `limit_s`."""
    steps = awaitable.__await__()
    try:
        waits_for = next(steps)
    except StopIteration:
        return
    async with asyncio.timeout(limit_s):
        await _Rest(steps, waits_for)


class _Rest:
    """What is left of an awaitable whose first step has been taken."""

    def __init__(self, steps: Generator[Any, Any, object], waits_for: object) -> None:
        self._steps = steps
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    answer = yield waits_for
                except BaseException as exc:  # a cancellation is the awaitable's to see
                    waits_for = self._steps.throw(exc)
                else:
                    waits_for = self._steps.send(answer)
        except StopIteration:
            return
