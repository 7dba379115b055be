"""The steps that an agent runs before it is ready: the shapes that serving will bring.

One decode row, as many as may run at once, and a prompt chunk whose row samples with every filter
on: first calls start threads, choose kernels and touch every page of the weights.  Then a few
decode steps are timed with nothing around them: the measure for what serving adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from llm_serving.agent.step_check import StepLimits
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs

__all__ = ["BARE_CONTEXT", "bare_decode_ms", "warm_up_steps"]

MAX_ROWS = 64  # more take the same paths, and a row of logits is large
CHUNK = 128  # tokens; enough to take the paths of long prompts
BARE_CONTEXT = 192  # tokens that a timed row sees: in the middle of an answer of 128 to 128
_TIMED = {1: 3, 8: 2, 32: 2}  # rows -> how often
_BUDGET_S = 0.5  # nothing is begun after that


def warm_up_steps(
    limits: StepLimits, max_num_seqs: int, max_num_batched_tokens: int
) -> Iterator[StepInputs]:
    greedy = SamplingParams()
    random = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    num_rows = min(max_num_seqs, max_num_batched_tokens, MAX_ROWS)
    pool = limits.num_blocks * limits.block_size
    chunk = min(CHUNK, max_num_batched_tokens, limits.max_model_len, pool)
    yield _step(limits, 1, 1, greedy)
    yield _step(limits, num_rows, 1, greedy)
    yield _step(limits, num_rows, 1, random)
    yield _step(limits, 1, chunk, random)


def bare_decode_ms(
    execute: Callable[[StepInputs], object],
    limits: StepLimits,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> tuple[int, dict[int, float]]:
    """Tokens of context, and for so many rows the median milliseconds of a greedy decode step.

    On a slow or busy machine only for few rows: nobody should wait long for it.
    """
    pool = limits.num_blocks * limits.block_size
    context = min(BARE_CONTEXT, limits.max_model_len, pool)
    most = min(max_num_seqs, max_num_batched_tokens, limits.num_blocks)
    spent: dict[int, float] = {}
    last_s = time.monotonic() + _BUDGET_S
    for num_rows, times in _TIMED.items():
        if num_rows <= most and time.monotonic() < last_s:
            inputs = _decode_step(limits, num_rows, context)
            execute(inputs)
            spent[num_rows] = statistics.median(_ms(execute, inputs) for _ in range(times))
    return context, spent


def _ms(execute: Callable[[StepInputs], object], inputs: StepInputs) -> float:
    began = time.perf_counter()
    execute(inputs)
    return (time.perf_counter() - began) * 1e3


def _decode_step(limits: StepLimits, num_rows: int, context: int) -> StepInputs:
    """One token for each row at the end of the same context; all rows read the same blocks.

    What they read was never written: that is as much work as any other bytes.
    """
    step = _step(limits, num_rows, 1, SamplingParams())
    last = np.full(num_rows, context - 1, np.int32)
    blocks = np.arange(-(-context // limits.block_size), dtype=np.int32)
    return msgspec.structs.replace(
        step,
        positions=last,
        slots=last,
        context_lens=last + np.int32(1),
        block_tables=np.tile(blocks, (num_rows, 1)),
    )


def _step(
    limits: StepLimits, num_rows: int, num_tokens: int, sampling: SamplingParams
) -> StepInputs:
    """Rows of `num_tokens` each from position 0, all in the same blocks."""
    place = np.tile(np.arange(num_tokens, dtype=np.int32), num_rows)
    blocks = np.arange(-(-num_tokens // limits.block_size), dtype=np.int32)
    none, no_floats = np.empty(0, np.int32), np.empty(0, np.float32)
    starts = np.arange(num_rows + 1, dtype=np.int32) * np.int32(num_tokens)
    return StepInputs(
        step_id=0,
        input_ids=np.zeros(len(place), np.int32),
        positions=place,
        slots=place,
        query_starts=starts,
        context_lens=np.full(num_rows, num_tokens, np.int32),
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
