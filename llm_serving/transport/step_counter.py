"""Does the agent move?  A few numbers in shared memory that say so without a message.

The master side makes and unlinks the segment, the agent writes, anybody on the master side reads:

    word   0     1       2       3          4       5
           pid   epoch   begun   finished   ticks   moved_ns
                         steps   steps      layers  monotonic time of the last change

Each word is one aligned store, so a reader sees old or new, never half.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from llm_serving.transport.shared_memory import SharedMemory

__all__ = ["StepCount", "StepCounter"]

_NUM_BYTES = 64
_PID, _EPOCH, _BEGUN, _FINISHED, _TICKS, _MOVED = range(6)


@dataclass(frozen=True, slots=True)
class StepCount:
    pid: int = 0  # 0: no agent has attached yet
    agent_epoch: int = 0
    begun: int = 0  # steps
    finished: int = 0  # steps, the failed ones included
    ticks: int = 0  # layers
    moved_ns: int = 0  # time.monotonic_ns() of the last change


class StepCounter:
    def __init__(self, segment: SharedMemory) -> None:
        self._segment = segment
        self._words = memoryview(segment.memory)[:_NUM_BYTES].cast("Q")

    @classmethod
    def create(cls) -> StepCounter:
        return cls(SharedMemory.create(_NUM_BYTES))

    @classmethod
    def attach(cls, name: str) -> StepCounter:
        return cls(SharedMemory.attach(name))

    @property
    def name(self) -> str:
        return self._segment.name

    def restart(self, agent_epoch: int) -> None:
        """This process writes from now on, and begins at zero."""
        self._words[_BEGUN] = self._words[_FINISHED] = self._words[_TICKS] = 0
        self._words[_EPOCH] = agent_epoch
        self._words[_PID] = os.getpid()
        self._words[_MOVED] = time.monotonic_ns()

    def begin(self) -> None:
        """A step begins."""
        self._count(_BEGUN)

    def tick(self) -> None:
        """A layer is finished."""
        self._count(_TICKS)

    def finish(self) -> None:
        """A step is finished, well or not."""
        self._count(_FINISHED)

    def read(self) -> StepCount:
        return StepCount(*self._words[: _MOVED + 1])

    def close(self) -> None:
        """Unlink, if we created it."""
        self._segment.close()

    def _count(self, word: int) -> None:
        self._words[word] += 1
        self._words[_MOVED] = time.monotonic_ns()
