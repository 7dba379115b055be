"""K-quants in the blocks that the native kernels multiply with."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Quant
from gguf import dequantize

from llm_serving.prepare.gguf_rows import q4_k_to_q4_1


def test_q4_k_becomes_q4_1_with_nothing_lost_but_the_rounding_of_scales() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (5, 3 * 144), dtype=np.uint8)
    blocks = rows.reshape(-1, 144)
    blocks[:, 0:4] = rng.uniform(0.001, 0.1, (15, 2)).astype("<f2").view(np.uint8)  # d, dmin
    exact = dequantize(rows, Quant.Q4_K)
    converted = q4_k_to_q4_1(rows)
    assert converted.shape == (5, 3 * 8 * 20)
    found = dequantize(converted, Quant.Q4_1)
    assert found.shape == exact.shape == (5, 768)
    largest = np.abs(exact.reshape(5, -1, 32)).max(-1, keepdims=True) + 15 * 0.1 * 63
    error = np.abs(found - exact).reshape(5, -1, 32)
    assert (error <= largest * 2**-11).all()
    assert np.abs(exact).max() > 10
