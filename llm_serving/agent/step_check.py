"""Whether a step's arrays fit together and stay inside what the agent has.

Every index that a kernel will follow is bounded here, before the first one does: a native kernel
does not look, and on a GPU a wrong index ends the process.  What is wrong is a ChannelError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ChannelError
from llm_serving.step_arrays import StepInputs

__all__ = ["StepLimits", "check_step"]

Ints = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int32 | np.float32]


@dataclass(frozen=True, slots=True)
class StepLimits:
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int


def check_step(inputs: StepInputs, limits: StepLimits) -> None:
    num_tokens, num_rows = len(inputs.input_ids), len(inputs.context_lens)
    if num_rows == 0:
        raise ChannelError("context_lens has no entries: a step has at least one row")
    _check_length("positions", inputs.positions, num_tokens)
    _check_length("slots", inputs.slots, num_tokens)
    _check_length("query_starts", inputs.query_starts, num_rows + 1)
    _check_length("block_tables", inputs.block_tables, num_rows)
    _check_length("sources", inputs.sources, num_rows)
    _check_length("adapter_ids", inputs.adapter_ids, num_rows)
    _check_range("input_ids", inputs.input_ids, limits.vocab_size)
    _check_range("positions", inputs.positions, limits.max_model_len)
    _check_range("slots", inputs.slots, limits.num_blocks * limits.block_size)
    _check_rows(inputs, limits)
    _check_samples(inputs, limits)


def _check_rows(inputs: StepInputs, limits: StepLimits) -> None:
    starts, contexts, tables = inputs.query_starts, inputs.context_lens, inputs.block_tables
    counts = starts[1:] - starts[:-1]
    if starts[0] != 0 or starts[-1] != len(inputs.input_ids) or counts.min(initial=1) < 1:
        raise ChannelError("query_starts must rise from 0 to the number of tokens")
    if (contexts < counts).any():
        raise ChannelError("context_lens: a row's context is shorter than its own tokens")
    num_blocks = -(-contexts // limits.block_size)
    if tables.ndim != 2 or num_blocks.max(initial=0) > tables.shape[1]:
        raise ChannelError("block_tables: a row's context is longer than its blocks")
    used = tables[np.arange(tables.shape[1]) < num_blocks[:, None]]
    _check_range("block_tables", used, limits.num_blocks)


def _check_samples(inputs: StepInputs, limits: StepLimits) -> None:
    num_samples, num_biases = len(inputs.sampling), len(inputs.bias_rows)
    _check_length("logit_positions", inputs.logit_positions, num_samples)
    _check_range("logit_positions", inputs.logit_positions, len(inputs.input_ids))
    if (inputs.logit_positions[1:] <= inputs.logit_positions[:-1]).any():
        raise ChannelError("logit_positions must rise")
    _check_length("history_starts", inputs.history_starts, num_samples + 1)
    _check_length("history_prompt_lens", inputs.history_prompt_lens, num_samples)
    starts = inputs.history_starts
    if starts[0] != 0 or starts[-1] != len(inputs.history_ids) or (starts[1:] < starts[:-1]).any():
        raise ChannelError("history_starts must rise from 0 to the number of history_ids")
    _check_range("history_ids", inputs.history_ids, limits.vocab_size)
    _check_length("bias_ids", inputs.bias_ids, num_biases)
    _check_length("bias_values", inputs.bias_values, num_biases)
    _check_range("bias_rows", inputs.bias_rows, num_samples)
    _check_range("bias_ids", inputs.bias_ids, limits.vocab_size)
    _check_range("wanted_logits", inputs.wanted_logits, num_samples)


def _check_length(name: str, array: Numbers, right: int) -> None:
    if len(array) != right:
        raise _wrong_length(name, array, right)


def _check_range(name: str, array: Ints, limit: int) -> None:
    if len(array) and array.view(np.uint32).max() >= limit:  # what is below 0 is above 2**31
        raise _out_of_range(name, array, limit)


# Apart, because every step passes through the functions above, and they format nothing.
def _wrong_length(name: str, array: Numbers, right: int) -> ChannelError:
    return ChannelError(f"{name} has {len(array)} entries, expected {right}")


def _out_of_range(name: str, array: Ints, limit: int) -> ChannelError:
    least, most = array.min(), array.max()
    return ChannelError(f"{name} must lie in 0 .. {limit - 1}, found {least} .. {most}")
