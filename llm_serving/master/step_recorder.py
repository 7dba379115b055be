"""What a step's stamps add up to: one StepRecord for each step that has a result.

Without work the agent is idle, and that is nobody's fault: such a pause is left out, and so is
whatever came before a lost step or a new agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llm_serving.master.step import Step
from llm_serving.step_arrays import StepResult
from llm_serving.step_trace import StepRecord, kind_of

__all__ = ["StepRecorder", "StepStamps"]


@dataclass(slots=True)
class StepStamps:
    """CLOCK_MONOTONIC nanoseconds, taken as a step is made and as its result is used."""

    schedule: int
    build: int
    follows_pause: bool  # or the loss of a step: there is nothing that it could follow on
    update: int = 0
    publish: int = 0


class StepRecorder:
    def __init__(self, observe: Callable[[StepRecord], None]) -> None:
        self._observe = observe
        self._previous = 0  # when the agent was done with the last step

    def record(self, step: Step, stamps: StepStamps, result: StepResult) -> None:
        """The events of `step` have just been published."""
        rows, times, transfer = step.rows, result.times, result.transfer
        previous, waiting = self._previous, times.waiting
        if stamps.follows_pause:
            previous = waiting = min(max(stamps.schedule, waiting), times.received)
        self._previous = times.done
        num_decode = sum(
            row.num_tokens == 1 and row.start >= row.request.num_prompt_tokens for row in rows
        )
        self._observe(
            StepRecord(
                step.step_id,
                kind_of(len(rows), num_decode),
                len(rows),
                sum(row.num_tokens for row in rows),
                len(step.samplers),
                stamps.schedule,
                stamps.build,
                transfer.shm_write,
                transfer.frame_send,
                transfer.sent,
                previous,
                waiting,
                times.received,
                times.forward,
                times.sample,
                times.write,
                times.done,
                transfer.shm_read,
                stamps.update,
                stamps.publish,
                time.monotonic_ns(),
            )
        )
