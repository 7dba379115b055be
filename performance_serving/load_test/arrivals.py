"""When is each request due?  Pure, and the same for the same seed whatever the rate.

The gaps are gamma distributed; shape 1, the default, is the exponential of a Poisson process,
less is burstier, more is smoother.  The first request is due at 0, and the gaps are scaled so that
all of them, the one behind the last request included, fill count / rate seconds: the offered rate
is what was asked for, not what the dice made of it.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np

__all__ = ["due_times", "num_requests"]


def num_requests(rate: float, duration_s: float) -> int:
    """int(rate * duration_s), of the decimal numbers that the user typed: 0.29 * 100 is 29."""
    return int(Decimal(str(rate)) * Decimal(str(duration_s)))


def due_times(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the begin of the run, ascending, for each of `count` requests."""
    if count == 0:
        return []
    gaps = np.random.default_rng([seed, 0]).gamma(burstiness, size=count)
    if not (total := gaps.sum()):  # a shape near 0 can underflow
        return [0.0] * count
    gaps *= count / rate / total
    return [0.0, *np.cumsum(gaps[:-1]).tolist()]
