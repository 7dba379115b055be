"""What a step costs, as the agent measured it at its start: the scheduler's stand-in for a clock.

    step = base + rows * (row + row_context * k) + tokens * (token + token_context * k)

`rows` compute one token each, `tokens` are those of prompt chunks, and k is the context that a
token sees, in thousands of tokens.  A model of first order: weights are read once a step, linear
layers cost by the token, attention by the token and its context.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

__all__ = ["StepCost"]

# At most 12 days: whatever is reckoned with that stays finite.
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_ANY = 1 << 30  # tokens; more than any step has


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base_ms: Milliseconds  # a step at all
    row_ms: Milliseconds  # a decode row without any context
    row_context_ms: Milliseconds  # a decode row, for 1,000 tokens of context
    token_ms: Milliseconds  # a token of a prompt chunk without any context
    token_context_ms: Milliseconds  # such a token, for 1,000 tokens of context

    def decode_ms(self, num_rows: int, num_context_tokens: int) -> float:
        """Of a step of decode rows alone, which together see so many tokens."""
        return (
            self.base_ms + num_rows * self.row_ms + num_context_tokens / 1e3 * self.row_context_ms
        )

    def chunk_ms(self, start: int, num_tokens: int) -> float:
        """What the tokens `start` .. `start + num_tokens` of one row add to a step."""
        middle = start + num_tokens / 2  # what a token of the chunk sees on the average
        return num_tokens * (self.token_ms + middle / 1e3 * self.token_context_ms)

    def tokens_within(self, ms: float, start: int) -> int:
        """The largest chunk from `start` that adds no more than `ms`: `chunk_ms` solved for it."""
        if ms <= 0:
            return 0
        square = self.token_context_ms / 2e3
        linear = self.token_ms + start / 1e3 * self.token_context_ms
        divisor = linear + math.sqrt(linear**2 + 4 * square * ms)
        return int(min(_ANY, 2 * ms / divisor)) if divisor else _ANY
