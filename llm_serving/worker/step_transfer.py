"""Steps through shared memory, seen from the master: inputs in, results out.

Here is also how large the segments must be, so that a step within the limits always fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_serving.protocol import Executed, InputSizes
from llm_serving.step_arrays import StepInputs, StepResult, TransferTimes
from llm_serving.step_packing import RECORD_WORDS, pack_inputs, unpack_result
from llm_serving.transport.arena import Arena, TensorRef

__all__ = [
    "MAX_LOGIT_BIASES",
    "MAX_TOP_LOGPROBS",
    "StepLimits",
    "read_result",
    "result_bytes",
    "write_inputs",
]

MAX_LOGIT_BIASES = 1024  # of one request
MAX_TOP_LOGPROBS = 32  # alternatives to one token

NOT_TIMED = TransferTimes()
_NUM_BYTES = 4  # of a word


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that one step may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    vocab_size: int = 0  # of logits that may be asked for; 0: none will be

    @property
    def input_bytes(self) -> int:
        rows, width = self.max_num_seqs, -(-self.max_model_len // self.block_size) + 1
        per_token = 3  # input_ids, positions, slots
        per_row = 8 + width + self.max_model_len + 3 * MAX_LOGIT_BIASES  # the tables, the history
        numbers = per_token * self.max_num_batched_tokens + (per_row + RECORD_WORDS) * rows + 2
        return _NUM_BYTES * numbers

    @property
    def result_bytes(self) -> int:
        per_sample = 3 + 2 * MAX_TOP_LOGPROBS + self.vocab_size
        return _NUM_BYTES * per_sample * self.max_num_seqs


def write_inputs(arena: Arena, slot: int, inputs: StepInputs) -> tuple[InputSizes, TensorRef]:
    """Raises ChannelError for a step over the limits, or an array of another dtype."""
    sizes, words = pack_inputs(inputs)
    return sizes, arena.write_joined(slot, words)


def read_result(
    arena: Arena, executed: Executed, transfer: TransferTimes = NOT_TIMED
) -> StepResult:
    """A copy; the slot is free again.  Raises ChannelError for a malformed one."""
    words = arena.read(executed.words).copy()
    arena.release(executed.words.slot)
    columns = unpack_result(executed.sizes, words)
    return StepResult(executed.step_id, executed.agent_epoch, *columns, executed.times, transfer)


def result_bytes(executed: Executed) -> int:
    """How much of it has travelled in shared memory."""
    return _NUM_BYTES * math.prod(executed.words.shape)
