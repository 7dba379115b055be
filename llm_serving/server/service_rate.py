"""How many requests does this server finish per second, and when does it pay to come back?

Served requests and the seconds in which any request was open are both smoothed exponentially:
what was `SMOOTHING_S` of such seconds ago counts 1/e of what is now.  Their quotient is the rate,
so neither a young server nor one that had nothing to do looks slow.
"""

from __future__ import annotations

import math

__all__ = ["ServiceRate"]

SMOOTHING_S = 30.0
LEAST_S, MOST_S = 1.0, 120.0


class ServiceRate:
    def __init__(self) -> None:
        self._num_served = 0.0
        self._busy_s = 0.0
        self._counted_s: float | None = None  # up to when; None while nothing is open

    def begin(self, now_s: float) -> None:
        """A request is open; no effect if one was before."""
        if self._counted_s is None:
            self._counted_s = now_s

    def pause(self, now_s: float) -> None:
        """None is open any more."""
        self._count(now_s)
        self._counted_s = None

    def served(self, now_s: float) -> None:
        """One of those that are open has been served."""
        self._count(now_s)
        self._num_served += 1.0

    def time_for(self, num_requests: float, now_s: float) -> float:
        """Seconds until so many will have been served, between LEAST_S and MOST_S."""
        self._count(now_s)
        if self._num_served == 0.0:
            return LEAST_S
        return min(max(num_requests * self._busy_s / self._num_served, LEAST_S), MOST_S)

    def _count(self, now_s: float) -> None:
        if self._counted_s is None:
            return
        rest = math.exp((self._counted_s - now_s) / SMOOTHING_S)
        self._num_served *= rest
        self._busy_s = self._busy_s * rest + SMOOTHING_S * (1.0 - rest)
        self._counted_s = now_s
