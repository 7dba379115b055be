"""How many requests does this server finish per second, and when does it pay to come back?

The rate is smoothed exponentially: what finished `SMOOTHING_S` ago counts 1/e of what finishes
now.  The weight of the time before the first request is divided out, so that a young server
does not look slow.
"""

from __future__ import annotations

import math

__all__ = ["ServiceRate"]

SMOOTHING_S = 30.0
LEAST_S, MOST_S = 1.0, 120.0


class ServiceRate:
    def __init__(self, now_s: float) -> None:
        self._began_s = self._last_s = now_s
        self._rate = 0.0

    def finished(self, now_s: float) -> None:
        """One request has been served."""
        self._decay(now_s)
        self._rate += 1.0 / SMOOTHING_S

    def per_second(self, now_s: float) -> float:
        self._decay(now_s)
        weight = -math.expm1((self._began_s - now_s) / SMOOTHING_S)
        return self._rate / weight if weight > 0 else 0.0

    def time_for(self, num_requests: float, now_s: float) -> float:
        """Seconds until so many will have been served, between LEAST_S and MOST_S."""
        rate = self.per_second(now_s)
        return min(max(num_requests / rate, LEAST_S), MOST_S) if rate > 0 else LEAST_S

    def _decay(self, now_s: float) -> None:
        self._rate *= math.exp((self._last_s - now_s) / SMOOTHING_S)
        self._last_s = now_s
