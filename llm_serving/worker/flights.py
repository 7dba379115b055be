"""Which steps are outstanding, who has still to answer them, and since when is it their turn?

Every rank answers every step, in order.  A step is over when all ranks have answered it, which is
then the first in the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from llm_serving.errors import AgentError, ChannelError
from llm_serving.step_arrays import StepResult
from llm_serving.worker.traffic import Call

__all__ = ["Flight", "Flights"]


@dataclass(slots=True)
class Flight:
    step_id: int
    slot: int  # of the input segment, not to be written again before the flight is over
    future: asyncio.Future[StepResult]
    call: Call
    num_answers: int = 0
    result: StepResult | None = None
    failure: AgentError | None = None

    def land(self) -> None:
        """Tell whoever still waits."""
        if self.future.done():
            return
        if self.failure is not None:
            self.future.set_exception(self.failure)
        elif self.result is not None:
            self.future.set_result(self.result)

    def lose(self, reason: AgentError) -> None:
        if not self.future.done():
            self.future.set_exception(type(reason)(*reason.args))


class Flights:
    """Those of one epoch."""

    def __init__(self, num_ranks: int) -> None:
        self.first_since = 0.0  # time.monotonic() when the first one became the first
        self._flights: deque[Flight] = deque()
        self._num_over = 0
        self._num_answers = [0] * num_ranks

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def first(self) -> Flight:
        return self._flights[0]

    def add(self, flight: Flight) -> None:
        self._flights.append(flight)
        if len(self._flights) == 1:
            self.first_since = time.monotonic()

    def answer(self, rank: int, step_id: int) -> Flight:
        """The step that a rank had to answer next.  Raises ChannelError if it is another."""
        place = self._num_answers[rank] - self._num_over
        if place >= len(self._flights) or self._flights[place].step_id != step_id:
            raise ChannelError(f"agent {rank} answered step {step_id} out of turn")
        self._num_answers[rank] += 1
        self._flights[place].num_answers += 1
        return self._flights[place]

    def take_over(self) -> Flight | None:
        """The first step, if every rank has answered it."""
        if not self._flights or self._flights[0].num_answers < len(self._num_answers):
            return None
        self._num_over += 1
        self.first_since = time.monotonic()
        return self._flights.popleft()

    def owed_by(self, rank: int) -> int:
        """How many answers it has still to give."""
        return len(self._flights) + self._num_over - self._num_answers[rank]

    def take_all(self) -> list[Flight]:
        """Forget every step and every answer: a new epoch."""
        flights = list(self._flights)
        self._flights.clear()
        self._num_over = 0
        self._num_answers = [0] * len(self._num_answers)
        return flights
