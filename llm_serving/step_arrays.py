"""One step as arrays: what crosses the process border, whoever stands on either side.

A step crosses as flat arrays, row after row, and comes back as one entry per sampling row:

    rows                a (decode)    b (prompt chunk)      c (decode, id not known yet)
    input_ids           [ 13           21  22  23            0 ]
    query_starts        [ 0            1                     4             5 ]
    sources             [ -1           -1                    2 ]   <- sampling row of the last step
    logit_positions     [ 0                                  4 ]   <- b's chunk ends before its end

`step_packing` makes one array of it, for the wire.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm_serving.protocol import StepTimes

__all__ = ["Floats", "Ints", "StepInputs", "StepResult", "TransferTimes"]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class StepInputs(msgspec.Struct, frozen=True, gc=False):
    """Everything an agent needs for one step, so that it has to remember nothing."""

    step_id: int
    input_ids: Ints  # [num_tokens] the tokens to compute; 0 where `sources` says which
    positions: Ints  # [num_tokens] each token's place in its own sequence
    slots: Ints  # [num_tokens] where its key and value go: block * block_size + offset
    query_starts: Ints  # [num_rows + 1] row i owns tokens query_starts[i] .. query_starts[i + 1]
    context_lens: Ints  # [num_rows] tokens visible to the row's last token
    block_tables: Ints  # [num_rows, width] blocks of each row's context, padded with -1
    sources: Ints  # [num_rows] the previous step's sample that is the row's input; -1: id known
    adapter_ids: Ints  # [num_rows] reserved; 0 is the base model
    logit_positions: Ints  # [num_samples] the tokens whose logits are sampled, rising
    sampling: npt.NDArray[Any]  # [num_samples] SAMPLING_DTYPE
    history_starts: Ints  # [num_samples + 1] whose ids a sample's penalties see; empty: none
    history_ids: Ints  # prompt and known output; an id still in flight is added by the agent
    history_prompt_lens: Ints  # [num_samples] how many of its history are the prompt
    bias_rows: Ints  # [num_biases] sample, token id and value of each logit bias
    bias_ids: Ints
    bias_values: Floats
    wanted_logits: Ints  # [num_wanted] the samples whose logits come back, see StepResult


class TransferTimes(msgspec.Struct, frozen=True, gc=False):
    """What the worker has spent on a step: when each part began, CLOCK_MONOTONIC nanoseconds."""

    shm_write: int = 0
    frame_send: int = 0
    sent: int = 0
    shm_read: int = 0


class StepResult(msgspec.Struct, frozen=True, gc=False):
    step_id: int
    agent_epoch: int
    token_ids: Ints  # [num_samples]
    logprobs: Floats  # [num_samples] of the sampled id, before penalties, temperature and filters
    top_ids: Ints  # [num_samples, max num_logprobs of the step] likeliest first
    top_logprobs: Floats
    finite: npt.NDArray[np.bool_]  # [num_samples] False if any logit was inf or nan
    logits: Floats  # [num_wanted, vocab] as the model gave them, before penalties and filters
    times: StepTimes
    transfer: TransferTimes = TransferTimes()

    def has_size(self, num_samples: int) -> bool:
        """Whether every column has an entry for each sample."""
        return (
            len(self.token_ids) == len(self.logprobs) == len(self.finite) == num_samples
            and len(self.top_ids) == num_samples
            and self.top_ids.shape == self.top_logprobs.shape
        )
