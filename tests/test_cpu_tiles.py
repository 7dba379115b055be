"""Linear layers through tiles, bit for bit: the instructions' arithmetic stated in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.native_kernels import native_or_skip
from tests.test_cpu_linear import from_bf16, multiply, packed, random_packed, to_bf16

native = native_or_skip()
TILED = native.on_request()
Array = npt.NDArray[np.float32]

pytestmark = pytest.mark.parametrize("isa", TILED)


def tdpbf16ps_sums(w: Array, x: Array) -> Array:
    """x w^T in the order of TDPBF16PS (Intel's Software Developer's Manual, volume 2).

    For 32 values of k, zero past the last: the products at even k summed, those at odd k, both
    together, and that added to what came before.  A product of two bfloat16 is exact in float32,
    so that product and sum round once, as fused.
    """
    padding = -x.shape[1] % 32
    w, x = (np.pad(from_bf16(to_bf16(each)), ((0, 0), (0, padding))) for each in (w, x))
    total = np.zeros((len(x), len(w)), np.float32)
    for tile in range(0, x.shape[1], 32):
        halves = np.zeros((2, len(x), len(w)), np.float32)
        for k in range(tile, tile + 32):
            halves[k % 2] += x[:, k, None] * w[:, k]
        total += halves[0] + halves[1]
    return total


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 50])
def test_bfloat16_has_the_order_of_the_instruction(isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for n, k in [(1, 1), (33, 31), (16, 32), (70, 33), (31, 64), (100, 94), (64, 577)]:
        weight, raw = random_packed(rng, "BF16", n, k)
        x = rng.standard_normal((rows, k), np.float32)
        assert multiply(isa, weight, x).tobytes() == tdpbf16ps_sums(raw, x).tobytes(), (n, k)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 45])
def test_int8_has_the_bits_of_avx512(isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for n, k in [(1, 1), (33, 63), (16, 64), (70, 65), (31, 131), (64, 577), (32, 65536)]:
        weight, _ = random_packed(rng, "I8", n, k)
        x = rng.standard_normal((rows, k), np.float32) + np.float32(0.5)
        assert multiply(isa, weight, x).tobytes() == multiply("avx512", weight, x).tobytes(), (n, k)


SMALL = 2.0**-63  # its square is the smallest normal number
GAP = [0.0] * 31


@pytest.mark.parametrize(
    ("x", "w", "y"),
    [
        ([2.0**100, 0], [2.0**-130, 0], 0),  # a denormal value is zero
        ([2.0**-100, 0], [2.0**-40, 0], 0),  # so is a product
        ([SMALL, SMALL], [1.5 * SMALL, -SMALL], 0),  # and what comes of the two sums,
        ([SMALL, *GAP, SMALL], [1.5 * SMALL, *GAP, -SMALL], 0),  # and of two tiles
        ([SMALL, SMALL], [SMALL, SMALL], 2.0**-125),
    ],
)
def test_denormals_are_zero_and_stay_what_they_are_elsewhere(
    isa: str, x: list[float], w: list[float], y: float
) -> None:
    rows: npt.NDArray[Any] = to_bf16(np.array([w], np.float32))
    assert (from_bf16(rows) == w).all()
    weight = packed("BF16", "BF16", rows, len(w))
    assert multiply(isa, weight, np.array([x], np.float32), native.Pool(1)).item() == y
    assert np.float32(2.0**-130) * np.float32(0.5) == np.float32(2.0**-131)


@pytest.mark.skipif("amx" not in TILED, reason="this processor, system or build has no AMX")
@pytest.mark.parametrize("format", ["BF16", "I8"])
def test_the_processor_does_what_the_emulation_does(isa: str, format: str) -> None:
    rng = np.random.default_rng(0)
    for rows, n, k in [(1, 100, 1000), (20, 64, 577), (70, 130, 4128)]:
        weight, _ = random_packed(rng, format, n, k)
        x = rng.standard_normal((rows, k), np.float32)
        y = multiply("amx_emulated", weight, x)
        assert multiply(isa, weight, x).tobytes() == y.tobytes(), (rows, n, k)
