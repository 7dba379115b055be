"""The model with nothing around it: decode steps that are built before they are timed.

What serving adds is measured against this loop: the same model, threads, rows and contexts, and
no scheduler, no transport, no text.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_serving.agent.model_runner import ModelRunner
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.model_card import ModelCard
from llm_serving.step_arrays import StepInputs

__all__ = ["BLOCK_SIZE", "BareLoop", "BareStep", "step_inputs"]

BLOCK_SIZE = 16
GREEDY = SamplingParams()
_TOKEN_ID = 1000  # which one does not matter, if the vocabulary has it


class BareStep(NamedTuple):
    """Milliseconds.  The step is both of its halves and the check and metadata ahead of them."""

    step_ms: float
    forward_ms: float
    sample_ms: float


class BareLoop:
    """Greedy rows side by side, each with a prompt of its own and an answer to it."""

    def __init__(
        self,
        card: ModelCard,
        *,
        num_rows: int,
        prompt_tokens: int,
        new_tokens: int,
        num_threads: int,
        device: str = "cpu",
        kv_dtype: str = "auto",
    ) -> None:
        """Loads the model, which takes seconds.  Raises ConfigError as `ModelRunner.load`."""
        self._num_rows, self._prompt_tokens, self._new_tokens = num_rows, prompt_tokens, new_tokens
        self._token_id = min(_TOKEN_ID, card.config.vocab_size - 1)
        self._num_blocks = -(-(prompt_tokens + new_tokens) // BLOCK_SIZE)  # of each row
        self._runner = ModelRunner.load(
            card,
            device=device,
            max_model_len=prompt_tokens + new_tokens,
            block_size=BLOCK_SIZE,
            num_blocks=num_rows * self._num_blocks,
            max_num_seqs=num_rows,
            max_num_batched_tokens=num_rows * prompt_tokens,
            num_threads=num_threads,
            phase=lambda _: None,
            kv_dtype=kv_dtype,
        )
        self._step_id = 0
        self._run(0, prompt_tokens)

    def bind_thread(self) -> None:
        """As in the agent: see `ModelRunner.bind_thread`."""
        self._runner.bind_thread()

    @property
    def contexts(self) -> range:
        """Tokens that a row can see, in each step of `decode`."""
        return range(self._prompt_tokens + 1, self._prompt_tokens + self._new_tokens)

    def decode(self) -> list[BareStep]:
        """All decode steps of an answer, whose first token comes from the prompt's own step."""
        return [self._run(context - 1, 1) for context in self.contexts]

    def _run(self, start: int, num_tokens: int) -> BareStep:
        self._step_id += 1
        inputs = step_inputs(
            np.full((self._num_rows, num_tokens), self._token_id, np.int32),
            start=start,
            blocks_per_row=self._num_blocks,
            step_id=self._step_id,
        )
        began_ns = time.monotonic_ns()
        columns = self._runner.execute(inputs, _ignore_tick)
        ended_ns = time.monotonic_ns()
        return BareStep(
            (ended_ns - began_ns) / 1e6,
            (columns.sample_ns - columns.forward_ns) / 1e6,
            (columns.sampled_ns - columns.sample_ns) / 1e6,
        )


def step_inputs(
    ids: npt.NDArray[np.int32],
    *,
    start: int,
    blocks_per_row: int,
    step_id: int = 0,
    sampling: SamplingParams = GREEDY,
) -> StepInputs:
    """Rows of ids [rows, tokens] from place `start` of their sequences, each in its own blocks.

    Every row samples after its last token.
    """
    (rows, num_tokens), none = ids.shape, np.empty(0, np.int32)
    tables = np.arange(rows * blocks_per_row, dtype=np.int32).reshape(rows, -1)
    places = np.arange(start, start + num_tokens, dtype=np.int32)
    slots = tables[:, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
    starts = np.arange(rows + 1, dtype=np.int32) * np.int32(num_tokens)
    return StepInputs(
        step_id=step_id,
        input_ids=ids.ravel(),
        positions=np.tile(places, rows),
        slots=slots.astype(np.int32).ravel(),
        query_starts=starts,
        context_lens=np.full(rows, start + num_tokens, np.int32),
        block_tables=tables,
        sources=np.full(rows, -1, np.int32),
        adapter_ids=np.zeros(rows, np.int32),
        logit_positions=starts[1:] - np.int32(1),
        sampling=np.frombuffer(sampling.record() * rows, SAMPLING_DTYPE),
        history_starts=np.zeros(rows + 1, np.int32),
        history_ids=none,
        history_prompt_lens=np.zeros(rows, np.int32),
        bias_rows=none,
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
        wanted_logits=none,
    )


def _ignore_tick() -> None:
    pass
