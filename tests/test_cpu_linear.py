"""Packed linear layers against twins in numpy: the same quantisation, float64 or integers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.native_kernels import native_or_skip

_native = native_or_skip()

Array = npt.NDArray[np.float32]
Format, Source, Epilogue = _native.Format, _native.Source, _native.Epilogue
ISAS = [*_native.supported(), *_native.on_request()]
DENSE, BLOCKS = ["F32", "BF16", "I8"], ["Q8_0", "Q4_0", "Q4_1"]
POOL = _native.Pool(2)


def aligned(size: int) -> npt.NDArray[np.uint8]:
    memory = np.full(size + 64, 0xFF, np.uint8)  # NaN, wherever something is not written
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: npt.NDArray[np.uint16]) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def random_blocks(rng: np.random.Generator, format: str, n: int, k: int) -> npt.NDArray[np.uint8]:
    """Rows of a GGUF file: d, m (Q4_1), then the quants of 32 values, block after block."""
    blocks = k // 32
    scales = rng.uniform(-0.1, 0.1, (n, blocks, 2 if format == "Q4_1" else 1)).astype(np.float16)
    quants = rng.integers(0, 256, (n, blocks, 32 if format == "Q8_0" else 16), np.uint8)
    return np.concatenate([scales.view(np.uint8), quants], axis=2).reshape(n, -1)


def dequantised(format: str, rows: npt.NDArray[np.uint8], k: int) -> npt.NDArray[np.float64]:
    blocks = rows.reshape(len(rows), k // 32, -1)
    scales = np.ascontiguousarray(blocks[..., : 4 if format == "Q4_1" else 2]).view(np.float16)
    quants = blocks[..., 2 * scales.shape[-1] :]
    d = scales[..., :1].astype(np.float64)
    if format == "Q8_0":
        values = d * quants.view(np.int8)
    else:
        nibbles = np.concatenate([quants & 15, quants >> 4], axis=2).astype(np.float64)
        values = d * (nibbles - 8) if format == "Q4_0" else d * nibbles + scales[..., 1:]
    return values.reshape(len(rows), k)


def packed(format: str, source: str, rows: npt.NDArray[Any], k: int, **bias: Array) -> Any:
    n = len(rows)
    data = aligned(_native.packed_bytes(getattr(Format, format), n, k))
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(n, -1)
    _native.pack(POOL, getattr(Format, format), getattr(Source, source), raw, data, n, k)
    return _native.PackedWeight(getattr(Format, format), n, k, data, **bias)


def random_packed(
    rng: np.random.Generator, format: str, n: int, k: int, **bias: Array
) -> tuple[Any, npt.NDArray[Any]]:
    """A packed weight, and the rows it was packed from."""
    if format in BLOCKS:
        rows: npt.NDArray[Any] = random_blocks(rng, format, n, k)
        return packed(format, format, rows, k, **bias), rows
    rows = rng.standard_normal((n, k), np.float32) * 0.1
    return packed(format, "F32", rows, k, **bias), rows


def multiply(isa: str, weight: Any, x: Array, pool: Any = POOL, n: int = 0) -> Array:
    y = np.full((len(x), n or weight.n), np.nan, np.float32)
    _native.linear(_native.kernels(isa), pool, weight, x, y)
    return y


def quantised_blocks(x: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """int8 by blocks of 32, whose largest becomes -128; the values, and the scale of each block."""
    blocks = x.reshape(len(x), -1, 32)
    high, low = blocks.max(axis=2, keepdims=True), blocks.min(axis=2, keepdims=True)
    most = np.where(high >= -low, high, low)
    with np.errstate(divide="ignore"):
        inverse = np.where(most != 0, np.float32(-128) / most, np.float32(0))
    scale = most / np.float32(-128)
    quants = np.minimum(np.rint(blocks * inverse), 127)
    return quants.astype(np.float64), scale.astype(np.float64)


def expected(
    format: str, rows: npt.NDArray[Any], x: Array
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """x rows^T after the format's own rounding, in float64, and what float32 sums may be off."""
    k = x.shape[1]
    if format == "I8":
        return expected_int8(rows, x)
    if format == "BF16":
        w, x64 = (
            from_bf16(to_bf16(rows)).astype(np.float64),
            from_bf16(to_bf16(x)).astype(np.float64),
        )
    elif format == "F32":
        w, x64 = rows.astype(np.float64), x.astype(np.float64)
    else:
        quants, scale = quantised_blocks(x)
        w, x64 = dequantised(format, rows, k), (quants * scale).reshape(x.shape)
    # 4: in q4_1 d * q and m cancel.
    return x64 @ w.T, (4 * k + 8) * 2.0**-24 * (np.abs(x64) @ np.abs(w).T + 1e-30)


def expected_int8(rows: Array, x: Array) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    most = np.abs(rows).max(axis=1, keepdims=True)
    scale = most / np.float32(127)
    w = np.rint(rows * (np.float32(127) / most))
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    span = (high - low)[:, None]
    inverse = np.float32(255) / span
    zero = -128 - np.rint(low[:, None] * inverse)
    q = np.clip(np.rint(x * inverse) + zero, -128, 127)
    exact = (q - zero).astype(np.float64) @ w.T.astype(np.float64)
    y = exact * (scale.T.astype(np.float64) * (span / np.float32(255)))
    return y, np.abs(y) * 2.0**-21 + 1e-30


SHAPES = [(1, 32), (31, 64), (33, 96), (64, 576), (100, 1536), (130, 4128)]
ODD_SHAPES = [(1, 1), (5, 3), (17, 37), (47, 1), (70, 1027), (33, 2049)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 64])
def test_the_product_is_that_of_the_twin(isa: str, format: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for n, k in SHAPES + (ODD_SHAPES if format in DENSE else []):
        weight, raw = random_packed(rng, format, n, k)
        x = rng.standard_normal((rows, k), np.float32)
        y, allowed = expected(format, raw, x)
        assert (np.abs(multiply(isa, weight, x) - y) <= allowed).all(), (n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
def test_a_row_does_not_depend_on_its_company_nor_on_the_threads(isa: str, format: str) -> None:
    rng = np.random.default_rng(1)
    pools = [_native.Pool(1), POOL, _native.Pool(3)]
    for n, k in [(70, 64), (300, 2080)]:
        weight, _ = random_packed(rng, format, n, k)
        x = rng.standard_normal((130, k), np.float32) * rng.uniform(0.1, 10, (130, 1)).astype(
            np.float32
        )
        alone = np.concatenate([multiply(isa, weight, x[r : r + 1]) for r in range(len(x))])
        for num_rows, pool in itertools.product([*range(2, 40), 64, 97, 130], pools):
            rows = rng.permutation(130)[:num_rows]
            y = multiply(isa, weight, x[rows], pool)
            assert y.tobytes() == alone[rows].tobytes(), (num_rows, pool.num_threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
@pytest.mark.parametrize("rows", [1, 3, 14])
def test_epilogues(isa: str, format: str, rows: int) -> None:
    rng = np.random.default_rng(2)
    n, k = 160, 96
    bias = rng.standard_normal(n, np.float32)
    weight, raw = random_packed(rng, format, n, k, bias=bias)
    plain = multiply(
        isa,
        packed(format, format if format in BLOCKS else "F32", raw, k),
        x := rng.standard_normal((rows, k), np.float32),
    )
    kernels = _native.kernels(isa)
    assert np.array_equal(multiply(isa, weight, x), plain + bias)

    before = rng.standard_normal((rows, n), np.float32)
    y = before.copy()
    _native.linear(kernels, POOL, weight, x, y, Epilogue.ADD)
    assert np.array_equal(y, before + (plain + bias))

    halves = (plain + bias).reshape(rows, -1, 2, 16).astype(np.float64)
    gate, up = halves[:, :, 0].reshape(rows, -1), halves[:, :, 1].reshape(rows, -1)
    y = np.empty((rows, n // 2), np.float32)
    _native.linear(kernels, POOL, weight, x, y, Epilogue.SILU_MUL)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
@pytest.mark.parametrize("epilogue", [Epilogue.STORE, Epilogue.ADD])
def test_nothing_else_is_written_or_read(isa: str, format: str, epilogue: Any) -> None:
    """Rows of x and y that lie apart, n that ends within a panel; what is between holds NaN."""
    rng = np.random.default_rng(3)
    n, k, rows = 41, 64, 7
    weight, _ = random_packed(rng, format, n, k)
    x = np.full((rows, k + 5), np.nan, np.float32)
    x[:, :k] = rng.standard_normal((rows, k))
    y = np.full((rows, n + 9), np.nan, np.float32)
    y[:, :n] = 0
    _native.linear(_native.kernels(isa), POOL, weight, x[:, :k], y[:, :n], epilogue)
    assert np.array_equal(y[:, :n], multiply(isa, weight, np.ascontiguousarray(x[:, :k])))
    assert np.isnan(y[:, n:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_itself_only(isa: str, format: str, bad: float) -> None:
    rng = np.random.default_rng(4)
    weight, _ = random_packed(rng, format, 40, 64)
    x = rng.standard_normal((5, 64), np.float32)
    clean = multiply(isa, weight, x)
    x[2, 17] = bad
    y = multiply(isa, weight, x)
    assert not np.isfinite(y[2]).any()
    assert np.array_equal(np.delete(y, 2, axis=0), np.delete(clean, 2, axis=0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", DENSE + BLOCKS)
def test_zeros_give_zero(isa: str, format: str) -> None:
    weight, raw = random_packed(np.random.default_rng(5), format, 40, 64)
    assert not multiply(isa, weight, np.zeros((3, 64), np.float32)).any()
    if format in DENSE:
        nothing = packed(format, "F32", raw * 0, 64)
        assert not multiply(isa, nothing, np.ones((3, 64), np.float32)).any()


@pytest.mark.parametrize("isa", ISAS)
def test_int8_is_exact_at_the_ends_of_its_range(isa: str) -> None:
    """127 and 255 everywhere, k so large that an int32 is nearly full."""
    k = 65536
    weight = packed("I8", "F32", np.stack([np.ones(k, np.float32), -np.ones(k, np.float32)]), k)
    for x, sign in [(np.ones((2, k), np.float32), 1), (-np.ones((2, k), np.float32), -1)]:
        y = multiply(isa, weight, x)
        np.testing.assert_allclose(y, [[sign * k, -sign * k]] * 2, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_of_activations_are_as_fine_as_int8_allows(isa: str, format: str) -> None:
    """The largest of a block is -128 steps, whatever its sign; its opposite can only be 127."""
    rng = np.random.default_rng(9)
    weight, raw = random_packed(rng, format, 40, 64)
    for least, most in [(-1.0, 0.5), (-0.5, 1.0), (-1.0, 1.0)]:
        x = rng.uniform(least, most, (3, 64)).astype(np.float32)
        x[:, [3, 40]], x[:, [20, 63]] = least, most
        quants, scale = quantised_blocks(x)
        assert np.abs(quants).max() == 128
        assert np.abs(scale).max() == 1 / 128
        y, allowed = expected(format, raw, x)
        assert (np.abs(multiply(isa, weight, x) - y) <= allowed).all(), (least, most)


@pytest.mark.parametrize("source", ["BF16", *BLOCKS])
@pytest.mark.parametrize("format", DENSE)
def test_every_source_packs_as_its_float32_values_do(format: str, source: str) -> None:
    rng = np.random.default_rng(6)
    n, k = 50, 96
    if source == "BF16":
        rows: npt.NDArray[Any] = to_bf16(rng.standard_normal((n, k), np.float32))
        values = from_bf16(rows)
    else:
        rows = random_blocks(rng, source, n, k)
        values = dequantised(source, rows, k).astype(np.float32)
    x = rng.standard_normal((3, k), np.float32)
    got = multiply(ISAS[0], packed(format, source, rows, k), x)
    np.testing.assert_allclose(
        got, multiply(ISAS[0], packed(format, "F32", values, k), x), atol=1e-5
    )


@pytest.mark.parametrize("format", DENSE + BLOCKS)
def test_parts_pack_as_the_whole(format: str) -> None:
    rng = np.random.default_rng(7)
    n, k = 150, 64
    _, raw = random_packed(rng, format, n, k)
    source = getattr(Source, format if format in BLOCKS else "F32")
    raw = raw.view(np.uint8).reshape(n, -1)
    whole, parts = (aligned(_native.packed_bytes(getattr(Format, format), n, k)) for _ in range(2))
    _native.pack(POOL, getattr(Format, format), source, raw, whole, n, k)
    for first, end in [(0, 5), (5, 64), (64, 97), (97, 150)]:
        part = np.ascontiguousarray(raw[first:end])
        _native.pack(POOL, getattr(Format, format), source, part, parts, n, k, first)
    assert np.array_equal(whole, parts)


def test_what_is_wrong_is_said() -> None:
    data = aligned(_native.packed_bytes(Format.BF16, 40, 64))
    q4 = aligned(_native.packed_bytes(Format.Q4_0, 40, 64))
    weight = _native.PackedWeight(Format.BF16, 40, 64, data)
    kernels, x, y = _native.kernels(), np.zeros((2, 64), np.float32), np.zeros((2, 40), np.float32)
    with pytest.raises(ValueError, match="aligned to 64"):
        _native.PackedWeight(Format.BF16, 40, 64, aligned(len(data) + 1)[1:])
    with pytest.raises(ValueError, match="must have packed_bytes"):
        _native.PackedWeight(Format.BF16, 41, 66, data)
    with pytest.raises(ValueError, match="bias must have n = 40"):
        _native.PackedWeight(Format.BF16, 40, 64, data, np.zeros(41, np.float32))
    with pytest.raises(ValueError, match="multiples of 32, not 65"):
        _native.packed_bytes(Format.Q4_0, 40, 65)
    with pytest.raises(ValueError, match="at most 65536"):
        _native.packed_bytes(Format.I8, 40, 65537)
    with pytest.raises(ValueError, match="has 128 bytes, not 64"):
        _native.pack(POOL, Format.BF16, Source.BF16, np.zeros((40, 64), np.uint8), data, 40, 64)
    with pytest.raises(ValueError, match="its own blocks only"):
        _native.pack(POOL, Format.Q4_0, Source.F32, np.zeros((40, 256), np.uint8), q4, 40, 64)
    with pytest.raises(ValueError, match="at most n"):
        _native.pack(POOL, Format.BF16, Source.BF16, np.zeros((40, 128), np.uint8), data, 40, 64, 1)
    with pytest.raises(ValueError, match="k = 64 columns, not 63"):
        _native.linear(kernels, POOL, weight, x[:, :63], y)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 40\)"):
        _native.linear(kernels, POOL, weight, x, y[:1])
    with pytest.raises(ValueError, match="silu_mul needs n in multiples of 32"):
        _native.linear(kernels, POOL, weight, x, y[:, :20], Epilogue.SILU_MUL)
    with pytest.raises(ValueError, match="next to each other"):
        _native.linear(kernels, POOL, weight, x, np.zeros((40, 2), np.float32).T)
    with pytest.raises(ValueError, match="isa must be one of auto, "):
        _native.kernels("sse")
    with pytest.raises(ValueError, match="num_threads must be"):
        _native.Pool(0)
    with pytest.raises(ValueError, match="spin_us must not"):
        _native.Pool(1, -1)


@pytest.mark.parametrize(("threads", "spin_us"), [(1, 0), (2, 0), (4, 0), (4, 50)])
def test_pools_come_and_go(threads: int, spin_us: int) -> None:
    """More threads than cores, sleeping at once or spinning first; a call has barriers inside."""
    weight, _ = random_packed(np.random.default_rng(8), "F32", 64, 32)
    x = np.random.default_rng(9).standard_normal((4, 32), np.float32)
    y = multiply(ISAS[0], weight, x)
    for _ in range(20):
        pool = _native.Pool(threads, spin_us)
        for _ in range(50):
            assert np.array_equal(multiply(ISAS[0], weight, x, pool), y)
