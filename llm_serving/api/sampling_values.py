"""How does a number that a client gave become one that a step record holds?

The records hold float32 and int32: a number is rounded, but one that is not zero never becomes
zero or infinite, and a top_k above the largest integer keeps every token, as it should.
"""

from __future__ import annotations

import secrets

import numpy as np

__all__ = ["MAX_DRAWN_SEED", "drawn_seed", "int32", "positive_float32"]

MAX_DRAWN_SEED = 2**53  # every JSON reader keeps it exactly
_MAX_INT32 = 2**31 - 1
_FLOAT32 = np.finfo(np.float32)
_SMALLEST, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)


def drawn_seed() -> int:
    return secrets.randbelow(MAX_DRAWN_SEED)


def positive_float32(value: float | None, default: float) -> float:
    """A positive number that is still positive and finite as a float32."""
    return default if value is None else min(max(value, _SMALLEST), _LARGEST)


def int32(value: int) -> int:
    """The number, or the largest there is."""
    return min(value, _MAX_INT32)
