"""Which request is the i-th of a run?  It depends on the data set, its token counts and the seed.

It does not depend on rate or duration, so that 0.1/s over 5000 s and 0.4/s over 1250 s send the
same 500 requests.  The data set is taken in order, from the start again when it is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from load_test.dataset import Entry, digest_of
from load_test.results import RequestRecord

__all__ = ["Plan", "Size"]


@dataclass(frozen=True, slots=True)
class Size:
    """Of an entry, in tokens."""

    prompt: int | None  # None: not counted, for nobody says how long the context is
    output: int


@dataclass(frozen=True, slots=True)
class Plan:
    entries: Sequence[Entry]
    sizes: Sequence[Size]  # of as many entries, from the first, as the run needs
    max_total_tokens: int | None  # prompt + new tokens; None: nothing is clipped
    cancel_rate: float = 0.0
    seed: int = 0

    def prompt(self, index: int) -> str:
        return self.entries[index % len(self.entries)].prompt

    def record(self, index: int, scheduled_s: float) -> RequestRecord:
        """The i-th request, as yet without a fate."""
        i = index % len(self.entries)
        wanted = max(1, self.sizes[i].output)
        room = self._room(self.sizes[i])
        asked = wanted if room is None else max(0, min(wanted, room))
        return RequestRecord(
            index=index,
            dataset_index=i,
            prompt_digest=digest_of(self.entries[i].prompt),
            scheduled_s=scheduled_s,
            asked_tokens=asked,
            is_clipped=0 < asked < wanted,
            is_impossible=asked == 0,
            cancel_after=self._cancel_after(index, asked),
        )

    @property
    def is_impossible(self) -> bool:
        """Whether no entry has room for an answer."""
        rooms = [self._room(size) for size in self.sizes]
        return all(room is not None and room < 1 for room in rooms)

    def _room(self, size: Size) -> int | None:
        if self.max_total_tokens is None or size.prompt is None:
            return None
        return self.max_total_tokens - size.prompt

    def _cancel_after(self, index: int, asked: int) -> int | None:
        """A draw of its own for each request, so that one does not depend on another."""
        if not self.cancel_rate or not asked:
            return None
        dice = np.random.default_rng([self.seed, 1, index])
        if dice.random() >= self.cancel_rate:
            return None
        return int(dice.integers(1, max(2, asked)))  # before the last, where there are several
