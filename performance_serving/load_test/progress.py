"""How far is the run, in one line?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from load_test.client import Clock
from load_test.load import Load

__all__ = ["RunProgress"]

_PERIOD_S = 0.5
_WINDOW = 10  # periods over which tokens/s is taken


class RunProgress:
    def __init__(
        self, load: Load, clock: Clock, total: int | None, show: Callable[[int, str], None]
    ) -> None:
        self._load = load
        self._clock = clock
        self._total = total
        self._show = show
        self._marks: list[tuple[float, int]] = []

    async def follow(self) -> None:
        """Until it is cancelled."""
        while True:
            self._show(self._load.num_ended, self.line())
            await asyncio.sleep(_PERIOD_S)

    def line(self) -> str:
        load = self._load
        words = [f"sent {load.num_ended + load.num_in_flight}", f"running {load.num_in_flight}"]
        words += [f"errors {load.num_errors}", f"{self._tokens_per_s():.0f} tokens/s"]
        if (eta_s := self._eta_s()) is not None:
            words.append(f"ETA {int(eta_s) // 60}:{int(eta_s) % 60:02}")
        return "  ".join(words)

    def _tokens_per_s(self) -> float:
        """Of the last few seconds."""
        self._marks = [*self._marks[-_WINDOW:], (self._clock(), self._load.num_tokens)]
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _eta_s(self) -> float | None:
        if not self._total or not self._load.num_ended:
            return None
        return self._clock() * (self._total - self._load.num_ended) / self._load.num_ended
