"""What still fits into the step that is being scheduled: tokens, and milliseconds of prompt.

Rows that have one token to go are decode rows: somebody waits for their next id, and they are
limited by the number of tokens only.  Longer rows (prompts, and what is computed again) may
stretch the step to a multiple of a plain one: of the decode step that all who run or wait will
have together, for a few rows that decode while many prompts wait would keep these waiting long
and hardly get on themselves.  The first of the longer rows takes what it can use of that, at
least one block, and once one was cut, those behind it wait.

A step whose decode rows have all only just begun is not shared: in a burst the first prompt to be
done would hold up the others for the sake of its second token, and all would end one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from llm_serving.master.request import Request
from llm_serving.step_cost import StepCost

__all__ = ["StepBudget"]


class StepBudget:
    def __init__(self, num_tokens: int) -> None:
        """Only the number of tokens counts, until `share` is called."""
        self._num_tokens = num_tokens
        self._cost: StepCost | None = None
        self._spare_ms = 0.0  # what longer rows may still add
        self._least = 0  # tokens that the first of them gets, whatever they cost

    def share(
        self,
        running: Iterable[Request],
        num_expected: int,
        cost: StepCost,
        *,
        stretch: float,
        burst_tokens: int,
        block_size: int,
    ) -> None:
        """Limit longer rows beside the decode rows of `running`, if one is past its beginning.

        It is with `burst_tokens`, sampled or being sampled.  `num_expected` rows will decode
        once those that wait are in, of a like context.
        """
        num_rows = num_context_tokens = most_sampled = 0
        for request in running:
            if request.num_schedulable == 1:
                num_rows += 1
                num_context_tokens += request.num_scheduled_tokens + 1
                most_sampled = max(most_sampled, request.num_new_tokens + request.num_pending)
        if num_rows and most_sampled >= burst_tokens and math.isfinite(stretch):
            self._cost = cost
            expected_tokens = num_context_tokens * num_expected // num_rows
            plain_ms = cost.decode_ms(num_expected, expected_tokens)
            self._spare_ms = stretch * plain_ms - cost.decode_ms(num_rows, num_context_tokens)
            self._least = block_size

    @property
    def has_room(self) -> bool:
        """Whether some newcomer would fit: one that begins at its first token.  See `fit_from`."""
        return self._num_tokens > 0 and self._longest(0) > 0

    def fit(self, request: Request) -> int:
        """Tokens of the request that the step can take."""
        return self.fit_from(request.num_scheduled_tokens, request.num_schedulable)

    def fit_from(self, start: int, wanted: int) -> int:
        """The same for a row that begins at its token `start` and has so many to go."""
        if wanted > 1:
            wanted = min(wanted, self._longest(start))
        return min(wanted, self._num_tokens)

    def spend(self, request: Request, num_tokens: int) -> None:
        """So many are about to be taken."""
        self._num_tokens -= num_tokens
        if self._cost is None or request.num_schedulable == 1:
            return
        self._least = 0
        self._spare_ms -= self._cost.chunk_ms(request.num_scheduled_tokens, num_tokens)
        if num_tokens < request.num_schedulable:
            self._spare_ms = 0.0

    def _longest(self, start: int) -> int:
        if self._cost is None:
            return self._num_tokens
        return max(self._least, self._cost.tokens_within(self._spare_ms, start))
