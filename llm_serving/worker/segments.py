"""The shared memory of one server: made at its start, unlinked at its end, used by every epoch.

One segment takes the inputs of steps, which all ranks read; each rank has one for its results and
one for its step counter.
"""

from __future__ import annotations

from llm_serving.protocol import Attach
from llm_serving.transport.arena import Arena
from llm_serving.transport.step_counter import StepCounter
from llm_serving.worker.step_transfer import StepLimits

__all__ = ["Segments"]


class Segments:
    def __init__(self, limits: StepLimits, num_slots: int, num_ranks: int) -> None:
        """Raises ConfigError, and leaves nothing, if there is no room."""
        self._num_slots = num_slots
        self.inputs = Arena.create(num_slots, limits.input_bytes, writes=True)
        self.results: list[Arena] = []
        self.counters: list[StepCounter] = []
        try:
            for _ in range(num_ranks):
                self.results.append(Arena.create(num_slots, limits.result_bytes, writes=False))
                self.counters.append(StepCounter.create())
        except BaseException:
            self.close()
            raise

    def attach(self, rank: int) -> Attach:
        """What an agent is told."""
        results, counter = self.results[rank], self.counters[rank]
        return Attach(self.inputs.name, results.name, self._num_slots, counter.name)

    def reset(self) -> None:
        """Free every slot; only while no agent lives."""
        for arena in (self.inputs, *self.results):
            arena.reset()

    def close(self) -> None:
        for arena in (self.inputs, *self.results):
            arena.close()
        for counter in self.counters:
            counter.close()
