"""SIGTERM and Ctrl-C while the event loop runs: an event, and work that gives way to it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

__all__ = ["stop_event", "unless"]


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def unless(stop: asyncio.Event, work: Coroutine[object, object, object]) -> bool:
    """Do the work, and whether it was done before `stop` was set.  Raises what it raises."""
    working, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
