"""What steps cost with nothing around them, timed once at the start on the idle machine.

Two figures come out of it: decode steps as they are (the measure for what serving adds), and a
`StepCost` (how the scheduler knows what prompts cost those who decode).  The shapes are timed in
turn, round after round, so that a moment in which somebody else computes falls on all of them;
`StepCost` is drawn through the quickest of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llm_serving.agent.step_check import StepLimits
from llm_serving.agent.warm_up import equal_rows
from llm_serving.generation import SamplingParams
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost

__all__ = ["BareSteps", "Shape", "time_bare_steps"]

CONTEXT = 192  # tokens that a timed row sees: in the middle of an answer of 128 to 128
ROWS = (1, 8, 32)
CHUNK = 32  # prompt tokens: about what fits beside decode rows on a CPU
FAR, NEAR = 2048, 256  # where attention over the context shows, and where it is lost in the noise
TELLING = 2.0  # a chunk takes so many times what a row takes, or a longer one is timed
ROUNDS = 3  # the first is to get warm
BUDGET_S = 0.8  # nothing but a first decode row and a first chunk is begun after that


class Shape(NamedTuple):
    num_rows: int
    start: int  # the place of each row's first token
    num_tokens: int = 1  # of each row


@dataclass(frozen=True, slots=True)
class BareSteps:
    """A decode row and a chunk at place 0 were always timed, everything else if there was time."""

    context: int  # tokens that decode rows see
    chunk: int  # tokens of a prompt chunk
    far: int  # the start of rows and chunks far away; 0: there are none
    spent_ms: dict[Shape, list[float]]
    is_cut: bool = False  # the chunk tells little, and for a longer one there was no time

    @property
    def decode_ms(self) -> dict[int, float]:
        """For so many rows the median of the greedy decode steps."""
        near = (s for s in self.spent_ms if s.num_tokens == 1 and s.start == self.context - 1)
        every = {shape.num_rows: self.spent_ms[shape] for shape in sorted(near)}
        return {num_rows: statistics.median(ms[1:] or ms) for num_rows, ms in every.items()}

    @property
    def cost(self) -> StepCost:
        """Where something was not timed, decode rows count as cheap and far prompts as dear.

        So prompts get too small a share, if anything.
        """
        least_ms = min(min(ms) for ms in self.spent_ms.values())  # nothing is less than one row
        most, near = max(self.decode_ms), self.context / 1e3
        per_row = (self._least(Shape(most, self.context - 1)) - least_ms) / max(1, most - 1)
        slopes = (self._for_context(Shape(n, self.context - 1)) for n in self.decode_ms)
        row_context = next((slope for slope in slopes if slope is not None), 0.0)
        row_context = min(row_context, per_row / near)
        base_ms = max(0.0, least_ms - per_row)
        first, middle = Shape(1, 0, self.chunk), self.chunk / 2e3
        per_token = (self._least(first) - (0.0 if self.is_cut else base_ms)) / self.chunk
        token_context = self._for_context(first)
        if token_context is None:
            token_context = per_token / (1 + middle)  # as much as all of the rest
        token_context = min(token_context, per_token / middle)
        return StepCost(
            base_ms=base_ms,
            row_ms=max(0.0, per_row - near * row_context),
            row_context_ms=row_context,
            token_ms=max(0.0, per_token - middle * token_context),
            token_context_ms=token_context,
        )

    def _least(self, shape: Shape) -> float:
        return min(self.spent_ms[shape])

    def _for_context(self, near: Shape) -> float | None:
        """What 1,000 tokens of context add to one token of `near`; None: not timed."""
        far = near._replace(start=self.far)
        if near.start >= self.far or far not in self.spent_ms:
            return None
        more_ms = max(0.0, self._least(far) - self._least(near))
        return more_ms / (near.num_rows * near.num_tokens) / (far.start - near.start) * 1e3


def time_bare_steps(
    execute: Callable[[StepInputs], object],
    limits: StepLimits,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> BareSteps:
    """Time what these limits allow.  Nobody should wait long for it: see BUDGET_S."""

    def spent_on(shape: Shape) -> float:
        num_rows, start, num_tokens = shape
        inputs = equal_rows(
            limits, num_rows=num_rows, num_tokens=num_tokens, start=start, sampling=SamplingParams()
        )
        began = time.perf_counter()
        execute(inputs)
        return (time.perf_counter() - began) * 1e3

    last_s = time.monotonic() + BUDGET_S
    pool = limits.num_blocks * limits.block_size
    context = min(CONTEXT, limits.max_model_len, pool)
    longest = min(max_num_batched_tokens, limits.max_model_len, pool)
    most = min(max_num_seqs, max_num_batched_tokens, limits.num_blocks)
    spent = {Shape(1, context - 1): [spent_on(Shape(1, context - 1))]}
    one_ms = spent[Shape(1, context - 1)][0]
    chunk, is_cut = min(CHUNK, longest), False
    while (ms := spent_on(Shape(1, 0, chunk))) < TELLING * one_ms and chunk < longest:
        if is_cut := time.monotonic() >= last_s:
            break
        chunk = min(2 * chunk, longest)  # on a GPU short ones cost what the weights cost
    spent.setdefault(Shape(1, 0, chunk), []).append(ms)
    far = min(FAR, limits.max_model_len - chunk) // limits.block_size * limits.block_size
    far = far if far >= NEAR else 0
    for shape in _shapes(context, chunk, far, most) * ROUNDS:
        if time.monotonic() < last_s:
            spent.setdefault(shape, []).append(spent_on(shape))
    return BareSteps(context, chunk, far, spent, is_cut)


def _shapes(context: int, chunk: int, far: int, most: int) -> list[Shape]:
    """What is timed in each round, the most important first."""
    rows = sorted({min(num_rows, most) for num_rows in ROWS})
    some = min(ROWS[1], most)
    near = [Shape(num_rows, context - 1) for num_rows in rows]
    far_away = [Shape(1, far, chunk), Shape(some, far)] if far else []
    return [near[0], Shape(1, 0, chunk), *far_away[:1], *near[1:], *far_away[1:]]
