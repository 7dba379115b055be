"""When does the next request go out?  An open loop asks the clock, a closed one its clients.

The open loop never waits for an answer: a server that stalls finds all the requests that were due
meanwhile.  Every request of the plan becomes a record of the run when its turn comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice

from load_test.client import Client, Clock
from load_test.plan import Plan
from load_test.results import RequestRecord, Run

__all__ = ["Load"]


class Load:
    def __init__(
        self,
        plan: Plan,
        client: Client,
        run: Run,
        clock: Clock,
        on_end: Callable[[RequestRecord], object],
    ) -> None:
        self._plan = plan
        self._client = client
        self._run = run
        self._clock = clock
        self._on_end = on_end
        self.num_in_flight = 0
        self.num_ended = 0
        self.num_errors = 0

    @property
    def num_tokens(self) -> int:
        return self._client.num_tokens

    async def open_loop(self, due_s: Sequence[float]) -> None:
        """Request i goes out at due_s[i]."""
        async with asyncio.TaskGroup() as group:
            for index, at_s in enumerate(due_s):
                await asyncio.sleep(max(0.0, at_s - self._clock()))
                group.create_task(self._send(index, at_s))

    async def closed_loop(
        self, concurrency: int, num_requests: int | None, duration_s: float | None
    ) -> None:
        """Whichever ends it first; at least one of the two is given."""
        indices = islice(count(), num_requests)

        async def client() -> None:
            for index in _until(indices, self._clock, duration_s):
                await self._send(index, self._clock())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, num_requests or concurrency)):
                group.create_task(client())

    async def _send(self, index: int, scheduled_s: float) -> None:
        record = self._plan.record(index, scheduled_s)
        self._run.requests.append(record)
        if not record.is_impossible:
            self.num_in_flight += 1
            try:
                await self._client.send(record, self._plan.prompt(index))
            finally:
                self.num_in_flight -= 1
        self.num_ended += 1
        self.num_errors += record.state == "error"
        self._on_end(record)


def _until(
    indices: Iterable[int], clock: Callable[[], float], end_s: float | None
) -> Iterable[int]:
    """Takes an index only when there is still time for it."""
    while end_s is None or clock() < end_s:
        index = next(iter(indices), None)
        if index is None:
            return
        yield index
