"""Native norms, rotation and gate against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native_kernels import native_or_skip

native = native_or_skip()

ISAS = native.supported()
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 80, 576, 1000]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
def test_rms_norm_with_and_without_a_residual(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    kernels = native.kernels(isa)
    x, residual = rng.standard_normal((2, 5, n), np.float32) * 3
    weight = rng.uniform(-2, 2, n).astype(np.float32)

    def expected(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        scale = np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
        return np.asarray(rows / scale * weight)

    y = np.full_like(x, np.nan)
    native.rms_norm(kernels, x, weight, 1e-5, y)
    np.testing.assert_allclose(y, expected(x), rtol=2e-6)
    total = residual.copy()
    native.add_rms_norm(kernels, x, total, weight, 1e-5, y)
    np.testing.assert_array_equal(total, residual + x)
    np.testing.assert_allclose(y, expected(residual + x), rtol=2e-6)
    alone = np.empty_like(x[2:3])
    native.rms_norm(kernels, total[2:3], weight, 1e-5, alone)
    assert (alone[0].view(np.uint32) == y[2].view(np.uint32)).all()
    in_place = total.copy()
    native.rms_norm(kernels, in_place, weight, 1e-5, in_place)
    np.testing.assert_array_equal(in_place, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [2, 6, 16, 32, 46, 64, 80, 96, 128])
def test_rotation_turns_each_half_into_the_other(isa: str, d: int) -> None:
    rng = np.random.default_rng(d)
    heads = rng.standard_normal((7, d), np.float32)
    turns = rng.uniform(-9, 9, d // 2)
    cos = np.tile(np.cos(turns), 2).astype(np.float32)
    sin = np.concatenate([-np.sin(turns), np.sin(turns)]).astype(np.float32)
    swapped = np.concatenate([heads[:, d // 2 :], heads[:, : d // 2]], 1).astype(np.float64)
    expected = heads.astype(np.float64) * cos + swapped * sin
    native.rotate(native.kernels(isa), heads, cos, sin)
    np.testing.assert_allclose(heads, expected, atol=5e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
def test_silu_mul(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    gate, up = rng.standard_normal((2, n), np.float32) * 20
    gate[0] = -200.0
    y = np.full(n, np.nan, np.float32)
    native.silu_mul(native.kernels(isa), gate, up, y)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-30)


def test_both_instruction_sets_norm_and_gate_alike() -> None:
    if len(ISAS) < 2:
        pytest.skip("this processor has one instruction set of ours")
    x = np.random.default_rng(0).standard_normal((2, 3, 100), np.float32)
    results = []
    for isa in ISAS:
        normed, gated = np.empty_like(x[0]), np.empty(300, np.float32)
        native.rms_norm(native.kernels(isa), x[0], x[1, 0].copy(), 1e-6, normed)
        native.silu_mul(native.kernels(isa), x[0].ravel(), x[1].ravel(), gated)
        results.append((normed.tobytes(), gated.tobytes()))
    assert results[0] == results[1]


def test_arrays_that_do_not_fit_are_refused() -> None:
    x, kernels = np.zeros((2, 8), np.float32), native.kernels()
    with pytest.raises(
        ValueError, match=r"weight must be a contiguous float32 array of shape \[8\]"
    ):
        native.rms_norm(kernels, x, np.zeros(7, np.float32), 1e-6, x)
    with pytest.raises(ValueError, match=r"x must be a contiguous float32 array"):
        native.rms_norm(kernels, x.astype(np.float64), np.zeros(8, np.float32), 1e-6, x)
    with pytest.raises(ValueError, match="x must be a contiguous"):
        native.rms_norm(kernels, x[:, ::2], np.zeros(4, np.float32), 1e-6, x)
    with pytest.raises(ValueError, match="even"):
        native.rotate(kernels, np.zeros((1, 3), np.float32), x[0, :3], x[0, :3])
