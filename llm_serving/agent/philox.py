"""Which random number belongs to a token: randomness without a state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11)
turns a key and a counter into 128 random bits.  Here

    key      the request's 64-bit seed, low word first
    counter  (position of the token in its sequence, sample index, 0, 0)
    uniform  the upper 53 of the 64 bits (word 0 : word 1), times 2**-53: in [0, 1)

so a token's draw depends on nothing else: not on the batch, the step, the backend, or what was
drawn before.  Whoever changes any of this raises RANDOMNESS_VERSION: seeds then mean other texts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["RANDOMNESS_VERSION", "philox4x32", "uniforms"]

RANDOMNESS_VERSION = 1

Words = npt.NDArray[np.uint64]  # 32 bits each, in 64 so that products fit

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)  # golden ratio and sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: Words, keys: Words) -> Words:
    """The four output words [n, 4] of counters [n, 4] under keys [n, 2], words below 2**32."""
    c0, c1, c2, c3 = counters.T
    for number in range(_ROUNDS):
        k0, k1 = ((keys + np.uint64(number) * _WEYL) & _LOW).T
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (product1 >> _HALF) ^ c1 ^ k0, (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(
    seeds: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int32],
    sample_indices: npt.NDArray[np.int32],
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each of [n] draws."""
    counters = np.zeros((len(seeds), 4), np.uint64)
    counters[:, 0] = positions
    counters[:, 1] = sample_indices
    words = philox4x32(counters, np.stack([seeds & _LOW, seeds >> _HALF], axis=1))
    bits = (words[:, 0] << _HALF | words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
