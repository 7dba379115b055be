"""The steps that an agent runs before it is ready: the shapes that serving will bring.

One decode row, as many as may run at once, and a prompt chunk whose row samples with every filter
on: first calls start threads, choose kernels and touch every page of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llm_serving.agent.step_check import StepLimits
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs

__all__ = ["equal_rows", "warm_up_steps"]

MAX_ROWS = 64  # more take the same paths, and a row of logits is large
CHUNK = 128  # tokens; enough to take the paths of long prompts


def warm_up_steps(
    limits: StepLimits, max_num_seqs: int, max_num_batched_tokens: int
) -> Iterator[StepInputs]:
    greedy = SamplingParams()
    random = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    num_rows = min(max_num_seqs, max_num_batched_tokens, MAX_ROWS)
    pool = limits.num_blocks * limits.block_size
    chunk = min(CHUNK, max_num_batched_tokens, limits.max_model_len, pool)
    yield equal_rows(limits, num_rows=1, num_tokens=1, sampling=greedy)
    yield equal_rows(limits, num_rows=num_rows, num_tokens=1, sampling=greedy)
    yield equal_rows(limits, num_rows=num_rows, num_tokens=1, sampling=random)
    yield equal_rows(limits, num_rows=1, num_tokens=chunk, sampling=random)


def equal_rows(
    limits: StepLimits,
    *,
    num_rows: int,
    num_tokens: int,
    start: int = 0,
    sampling: SamplingParams,
) -> StepInputs:
    """Rows of `num_tokens` each from place `start`, all in the same blocks.

    What they see of the places before was never written, or again and again where the pool is
    smaller: that is as much work as any other bytes.
    """
    place = np.arange(start, start + num_tokens, dtype=np.int32)
    width = -(-(start + num_tokens) // limits.block_size)
    blocks = np.arange(width, dtype=np.int32) % np.int32(limits.num_blocks)
    slots = blocks[place // limits.block_size] * limits.block_size + place % limits.block_size
    none, no_floats = np.empty(0, np.int32), np.empty(0, np.float32)
    starts = np.arange(num_rows + 1, dtype=np.int32) * np.int32(num_tokens)
    return StepInputs(
        step_id=0,
        input_ids=np.zeros(num_rows * num_tokens, np.int32),
        positions=np.tile(place, num_rows),
        slots=np.tile(slots.astype(np.int32), num_rows),
        query_starts=starts,
        context_lens=np.full(num_rows, start + num_tokens, np.int32),
        block_tables=np.tile(blocks, (num_rows, 1)),
        sources=np.full(num_rows, -1, np.int32),
        adapter_ids=np.zeros(num_rows, np.int32),
        logit_positions=starts[1:] - np.int32(1),
        sampling=np.frombuffer(sampling.record() * num_rows, SAMPLING_DTYPE),
        history_starts=np.zeros(num_rows + 1, np.int32),
        history_ids=none,
        history_prompt_lens=np.zeros(num_rows, np.int32),
        bias_rows=none,
        bias_ids=none,
        bias_values=no_floats,
        wanted_logits=none,
    )
