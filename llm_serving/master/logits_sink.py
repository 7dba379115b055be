"""Who wants to see the logits of which positions?

A position is the index, in prompt and output, of the last token that the model has seen; its
logits are there when a token is sampled.  So what a prefix cache has found changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ChannelError
from llm_serving.master.step import Row, Step
from llm_serving.step_arrays import StepResult

__all__ = ["LogitsSink", "give_logits", "wanted_samples"]


class LogitsSink(Protocol):
    every: int  # positions that are multiples of it

    def take(
        self, token_ids: npt.NDArray[np.int32], position: int, logits: npt.NDArray[np.float32]
    ) -> None:
        """Keep the logits of a position; `token_ids` are those up to it, 0 .. position."""

    def has_room(self) -> bool: ...
    def on_room(self, call: Callable[[], None]) -> None: ...


def wanted_samples(samplers: list[Row], every: int | None) -> list[int]:
    """Those of a step's samples whose position is a multiple of `every`."""
    if every is None:
        return []
    return [i for i, row in enumerate(samplers) if _position(row) % every == 0]


def give_logits(step: Step, result: StepResult, sink: LogitsSink) -> None:
    """To be called before the step's result is credited: that may end requests.

    Raises ChannelError if the result has not the logits that were asked for.
    """
    wanted = wanted_samples(step.samplers, sink.every)
    if len(result.logits) != len(wanted):
        raise ChannelError(f"step {step.step_id}: {len(wanted)} rows of logits were asked for")
    for logits, i in zip(result.logits, wanted, strict=True):
        row = step.samplers[i]
        if row.epoch == row.request.epoch:  # else it will be computed again
            position = _position(row)
            sink.take(row.request.token_ids.view()[: position + 1].copy(), position, logits)


def _position(row: Row) -> int:
    return row.start + row.num_tokens - 1
