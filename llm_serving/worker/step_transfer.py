"""Steps through shared memory, seen from the master: inputs in, results out.

Here is also how large the segments must be, so that a step within the limits always fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np

from llm_serving.errors import ChannelError
from llm_serving.protocol import Executed
from llm_serving.step_arrays import StepInputs, StepResult, TransferTimes
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

_NAMES = tuple(f.name for f in fields(StepInputs) if f.name not in ("step_id", "sampling"))
_ARRAYS = attrgetter(*_NAMES)
_COLUMNS = {
    "token_ids": "int32",
    "logprobs": "float32",
    "top_ids": "int32",
    "top_logprobs": "float32",
    "finite": "bool",
    "logits": "float32",
}
NOT_TIMED = TransferTimes()
_NBYTES = attrgetter("nbytes")
_NUM_BYTES, _SAMPLING_BYTES, _ALIGN = 4, 64, 64  # an entry; a sampling record, at most; a tensor


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
        numbers = per_token * self.max_num_batched_tokens + per_row * rows + 2
        aligning = _ALIGN * len(fields(StepInputs))
        return _NUM_BYTES * numbers + _SAMPLING_BYTES * rows + aligning

    @property
    def result_bytes(self) -> int:
        per_sample = len(_COLUMNS) + 2 * MAX_TOP_LOGPROBS + self.vocab_size
        return _NUM_BYTES * per_sample * self.max_num_seqs + _ALIGN * len(_COLUMNS)


def write_inputs(arena: Arena, slot: int, inputs: StepInputs) -> dict[str, TensorRef]:
    """Raises ChannelError if the step is larger than the limits."""
    arrays = dict(zip(_NAMES, _ARRAYS(inputs), strict=True))
    arrays["sampling"] = inputs.sampling.view(np.uint8)
    return arena.write_all(slot, arrays)


def read_result(
    arena: Arena, executed: Executed, transfer: TransferTimes = NOT_TIMED
) -> StepResult:
    """Copies of the columns; the slot is free again.  Raises ChannelError for a malformed one."""
    tensors = executed.tensors
    if {name: ref.dtype for name, ref in tensors.items()} != _COLUMNS:
        raise _wrong_columns(tensors)
    columns = {name: view.copy() for name, view in arena.read_all(tensors).items()}
    arena.release(tensors["token_ids"].slot)
    return StepResult(
        executed.step_id,
        executed.agent_epoch,
        **columns,
        times=executed.times,
        transfer=transfer,
    )


def result_bytes(result: StepResult) -> int:
    """How much of it has travelled in shared memory."""
    columns = (result.token_ids, result.logprobs, result.top_ids, result.top_logprobs)
    num_bytes: int = sum(map(_NBYTES, columns)) + result.finite.nbytes + result.logits.nbytes
    return num_bytes


def _wrong_columns(tensors: Mapping[str, TensorRef]) -> ChannelError:
    found = {name: ref.dtype for name, ref in tensors.items()}
    return ChannelError(f"a result has the columns {found}, not {_COLUMNS}")
