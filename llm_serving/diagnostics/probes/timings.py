"""How long did one thing take, again and again: the arithmetic of a probe, no I/O.

A percentile is a time that was measured (nearest rank), never one in between.  KB = 1024 bytes,
MB = 1024 KB, GB = 1024 MB.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

__all__ = ["Budget", "Timing", "nearest_rank", "timed"]

_MB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Timing:
    way: str
    num_bytes: int  # of one direction
    num_rounds: int
    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, way: str, num_bytes: int, seconds: Sequence[float]) -> Timing:
        p50, p99 = (nearest_rank(seconds, share) * 1e6 for share in (0.5, 0.99))
        return cls(way, num_bytes, len(seconds), p50, p99)

    @property
    def mb_per_s(self) -> float:
        """There and back in the median round: twice the bytes."""
        return self._throughput(self.p50_us)

    @property
    def mb_per_s_p99(self) -> float:
        """What all rounds but the slowest hundredth reach."""
        return self._throughput(self.p99_us)

    def _throughput(self, us: float) -> float:
        return 2 * self.num_bytes / _MB / (us / 1e6) if us > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Budget:
    """How long one figure may be measured."""

    seconds: float
    max_rounds: int = 5000
    min_rounds: int = 5
    num_warm_up: int = 2


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all are not above.  Raises ValueError if there is none."""
    if not values:
        raise ValueError("no value was measured")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def timed(
    once: Callable[[], Awaitable[object]],
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of every round but the first few, which touch pages and fill caches."""
    for _ in range(budget.num_warm_up):
        await once()
    spent: list[float] = []
    deadline = clock() + budget.seconds
    while len(spent) < budget.max_rounds:
        began = clock()
        if began >= deadline and len(spent) >= budget.min_rounds:
            break
        await once()
        spent.append(clock() - began)
    return spent
