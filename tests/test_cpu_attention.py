"""Native attention against a naive twin in float64, over a cache whose other slots are NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.native_kernels import native_or_skip

native = native_or_skip()

Floats = npt.NDArray[np.float32]
ISAS = native.supported()
CACHES = ["bfloat16", "float32", "int8"]
TOLERANCES = {"bfloat16": 1e-2, "float32": 3e-6, "int8": 3e-4}


def to_bf16(x: Floats) -> npt.NDArray[np.uint16]:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def rounded(x: Floats, dtype: str) -> npt.NDArray[np.float64]:
    """What a cache of this dtype keeps of x."""
    if dtype == "bfloat16":
        x = (to_bf16(x).astype(np.uint32) << 16).view(np.float32)
    if dtype == "int8":
        tiny = np.float32(1e-30)
        scales = np.maximum(np.abs(x).max(-1, keepdims=True), tiny) / np.float32(127)
        x = np.rint(x * (np.float32(1) / scales)) * scales.astype(np.float64)
    return x.astype(np.float64)


def empty_cache(tiles: int, kv_heads: int, head_dim: int, dtype: str) -> npt.NDArray[Any]:
    """Of NaN; bytes cannot be, but their scales behind each tile and head."""
    if dtype == "int8":
        size = -(-head_dim // 4) * 4 * 16
        cache = np.full((tiles, kv_heads, size + 64), 99, np.int8)
        cache[..., size:] = np.full(16, np.nan, np.float32).view(np.int8)
        return cache
    kind, junk = (np.uint16, 0x7FFF) if dtype == "bfloat16" else (np.float32, np.nan)
    return np.full((tiles, kv_heads, 16 * head_dim), junk, kind)


@dataclass
class Model:
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "bfloat16"


class World:
    """A cache of NaN, and rows with blocks of their own in random order.

    `context_lens[i]` tokens of row i will be in the cache, the last `counts[i]` are its queries.
    """

    def __init__(self, model: Model, counts: list[int], context_lens: list[int], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.model, self.counts, self.context_lens = model, counts, context_lens
        m, longest = model, max(context_lens)
        needed = [-(-n // m.block_size) for n in context_lens]
        blocks = rng.permutation(sum(needed) + 3)[: sum(needed)]
        self.tables = np.full((len(counts), max(needed)), -1, np.int32)
        for row, own in enumerate(np.split(blocks, np.cumsum(needed)[:-1])):
            self.tables[row, : len(own)] = own
        tiles = (sum(needed) + 3) * m.block_size // 16
        self.keys = empty_cache(tiles, m.kv_heads, m.head_dim, m.dtype)
        self.values = self.keys.copy()
        width = (m.heads + 2 * m.kv_heads) * m.head_dim
        self.projected = [rng.standard_normal((n, width), np.float32) for n in context_lens]
        turns = rng.uniform(-3, 3, (longest, m.head_dim // 2)).astype(np.float32)
        self.cos = np.concatenate([np.cos(turns), np.cos(turns)], 1)
        self.sin = np.concatenate([-np.sin(turns), np.sin(turns)], 1)

    def slots(self, row: int, begin: int, end: int) -> npt.NDArray[np.int32]:
        places = np.arange(begin, end)
        size = self.model.block_size
        slots: npt.NDArray[np.int32] = self.tables[row, places // size] * size + places % size
        return slots.astype(np.int32)

    def step(
        self, isa: str, pool: object, spans: list[tuple[int, int, int]], plan_threads: int = 0
    ) -> list[Floats]:
        """Write tokens [begin, end) of some (row, begin, end), and what they attend to."""
        m = self.model
        kernels = native.kernels(isa)
        tokens = np.concatenate([self.projected[row][b:e] for row, b, e in spans])
        places = [np.arange(b, e, dtype=np.int32) for _, b, e in spans]
        slots = np.concatenate([self.slots(*span) for span in spans])
        native.write_cache(
            kernels, pool, self.keys, self.values, m.block_size, tokens, m.heads,
            self.cos, self.sin, np.concatenate(places), slots,
        )  # fmt: skip
        query = np.ascontiguousarray(tokens[:, : m.heads * m.head_dim])
        query = query.reshape(-1, m.heads, m.head_dim)
        starts = np.cumsum([0] + [e - b for _, b, e in spans]).astype(np.int32)
        step = native.AttentionStep(
            starts,
            np.array([e for _, _, e in spans], np.int32),
            np.stack([self.tables[row] for row, _, _ in spans]),
        )
        out = np.full(query.shape, np.nan, np.float32)
        native.attend(
            kernels, pool, step, self.keys, self.values, m.block_size, m.head_dim,
            query, out, plan_threads,
        )  # fmt: skip
        self.num_splits = step.num_splits
        return np.split(out, starts[1:-1])

    def rotated(self, row: int) -> tuple[npt.NDArray[np.float64], ...]:
        """Queries, keys, values of a row's whole context, float64 [context, heads, d]."""
        m, length = self.model, self.context_lens[row]
        heads = self.projected[row].astype(np.float64).reshape(length, -1, m.head_dim)
        turned, value = heads[:, : m.heads + m.kv_heads], heads[:, m.heads + m.kv_heads :]
        half = m.head_dim // 2
        swapped = np.concatenate([turned[..., half:], turned[..., :half]], -1)
        turned = turned * self.cos[:length, None] + swapped * self.sin[:length, None]
        return turned[:, : m.heads], turned[:, m.heads :], value

    def expected(self, row: int, begin: int, end: int) -> npt.NDArray[np.float64]:
        m = self.model
        query, key, value = self.rotated(row)
        key = rounded(key.astype(np.float32), m.dtype)[:end].repeat(m.heads // m.kv_heads, 1)
        value = rounded(value.astype(np.float32), m.dtype)[:end].repeat(m.heads // m.kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", query[begin:end], key) * m.head_dim**-0.5
        scores[:, np.arange(end) > np.arange(begin, end)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended: npt.NDArray[np.float64] = np.einsum("hqk,khd->qhd", weights, value)
        return attended

    def check(self, isa: str, num_threads: int = 1) -> None:
        """All earlier tokens as one prefill, then the rows' last tokens as a step of mixed rows."""
        pool = native.Pool(num_threads)
        pairs = [(n, n - count) for count, n in zip(self.counts, self.context_lens, strict=True)]
        before = [(row, 0, start) for row, (_, start) in enumerate(pairs) if start]
        for span in before:
            self.step(isa, pool, [span])
        spans = [(row, start, end) for row, (end, start) in enumerate(pairs)]
        tolerance = TOLERANCES[self.model.dtype]
        for span, out in zip(spans, self.step(isa, pool, spans), strict=True):
            np.testing.assert_allclose(out, self.expected(*span), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513])
def test_a_row_attends_to_its_context_and_nothing_else(isa: str, dtype: str, length: int) -> None:
    World(Model(dtype=dtype), [1], [length]).check(isa)
    World(Model(dtype=dtype, heads=3, kv_heads=1), [length], [length]).check(isa, 2)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 32, 46, 64, 80, 96, 100, 128, 256])
def test_any_even_head_dim(isa: str, dtype: str, head_dim: int) -> None:
    model = Model(heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype)
    World(model, [1, 5, 1], [70, 40, 33]).check(isa)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (5, 5), (7, 1), (14, 2), (8, 1), (9, 3), (33, 1), (100, 1)]
)
def test_any_number_of_heads(isa: str, dtype: str, heads: int, kv_heads: int) -> None:
    model = Model(heads=heads, kv_heads=kv_heads, head_dim=32, dtype=dtype)
    World(model, [1, 3, 40], [19, 300, 90]).check(isa, 2)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_any_block_size(isa: str, dtype: str, block_size: int) -> None:
    model = Model(block_size=block_size, dtype=dtype)
    World(model, [1, 33, 1, 7], [block_size, 3 * block_size, 2 * block_size + 1, 50]).check(isa)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_and_chunks_in_one_step(isa: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 600, 64).tolist()
    counts = [min(n, int(rng.choice([1, 1, 1, 20, 70]))) for n in lengths]
    World(Model(dtype=dtype), counts, lengths).check(isa, 2)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_long_context(isa: str, dtype: str) -> None:
    World(Model(heads=3, kv_heads=1, dtype=dtype), [5], [8000]).check(isa, 2)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("isa", ISAS)
def test_the_bits_do_not_depend_on_chunks_company_threads_or_splitting(
    isa: str, dtype: str
) -> None:
    model = Model(heads=6, kv_heads=2, head_dim=40, dtype=dtype)
    lengths = [1100, 33, 519]
    one, two = native.Pool(1), native.Pool(2)

    def whole(row: int) -> Floats:
        return World(model, lengths, lengths).step(isa, one, [(row, 0, lengths[row])])[0]

    expected = [whole(row) for row in range(3)]
    chunked = World(model, lengths, lengths)
    rng = np.random.default_rng(5)
    done, splits = [0, 0, 0], 0
    results: list[list[Floats]] = [[], [], []]
    while done != lengths:
        spans = []
        for row, n in enumerate(lengths):
            count = min(int(rng.choice([1, 1, 2, 31, 64, 100])), n - done[row])
            if count and rng.random() < 0.8:
                spans.append((row, done[row], done[row] + count))
        if not spans:
            continue
        pool, threads = (one, int(rng.choice([1, 64]))) if rng.random() < 0.5 else (two, 0)
        outs = chunked.step(isa, pool, spans, threads)
        splits += chunked.num_splits
        for (row, _, end), out in zip(spans, outs, strict=True):
            results[row].append(out)
            done[row] = end
    assert splits > 0
    for row in range(3):
        got = np.concatenate(results[row])
        assert (got.view(np.uint32) == expected[row].view(np.uint32)).all()
    again = World(model, lengths, lengths).step(
        isa, two, [(r, 0, n) for r, n in enumerate(lengths)]
    )
    for row in range(3):
        assert (again[row].view(np.uint32) == expected[row].view(np.uint32)).all()


@pytest.mark.parametrize("count", [1, 32])  # one tile of tokens
@pytest.mark.parametrize("isa", ISAS)
def test_splitting_a_few_tokens_with_a_long_context_does_not_change_their_bits(
    isa: str, count: int
) -> None:
    world, start = World(Model(), [1], [3000]), 3000 - count
    world.step(isa, native.Pool(1), [(0, 0, start)])
    (alone,) = world.step(isa, native.Pool(1), [(0, start, 3000)])
    assert world.num_splits == 0
    (split,) = world.step(isa, native.Pool(2), [(0, start, 3000)])
    assert world.num_splits == 1
    assert (alone.view(np.uint32) == split.view(np.uint32)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_scores_far_apart_neither_overflow_nor_vanish(isa: str) -> None:
    world = World(Model(heads=1, kv_heads=1, dtype="float32"), [1], [600])
    world.projected[0][:, :128] *= 40
    world.check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_sums_of_words_and_bytes_do_not_overflow(isa: str) -> None:
    world = World(Model(heads=2, kv_heads=1, head_dim=1024, dtype="int8"), [2], [64])
    heads = world.projected[0].reshape(64, 4, 1024)
    heads[:] = 1
    heads[1::2, 2:] = -1  # keys and values: what has the wrong sign is seen
    world.cos[:], world.sin[:] = 1, 0
    world.check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", CACHES)
def test_a_nan_in_a_rows_own_query_stays_and_harms_no_other(isa: str, dtype: str) -> None:
    world = World(Model(heads=2, kv_heads=1, dtype=dtype), [1, 1], [20, 20])
    for row in range(2):
        world.step(isa, native.Pool(1), [(row, 0, 19)])
    world.projected[0][19, 3] = np.nan
    broken, sound = world.step(isa, native.Pool(1), [(0, 19, 20), (1, 19, 20)])
    assert np.isnan(broken[0, 0]).all()
    assert np.isfinite(sound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("column", [2 * 24 + 5, 3 * 24 + 5])  # of the key, of the value
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_no_byte_can_hold_reaches_all_who_see_it_and_nobody_else(
    isa: str, column: int, bad: float
) -> None:
    world = World(Model(heads=2, kv_heads=1, head_dim=24, dtype="int8"), [20, 20], [20, 20])
    world.projected[0][10, column] = bad
    with np.errstate(invalid="ignore"):
        broken, sound = world.step(isa, native.Pool(1), [(0, 0, 20), (1, 0, 20)])
    assert np.isfinite(sound).all()
    assert np.isfinite(broken[:10]).all()
    assert not np.isfinite(broken[10:]).all(-1).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", CACHES)
def test_zeros_are_attended_to_as_zeros(isa: str, dtype: str) -> None:
    world = World(Model(dtype=dtype), [3], [70])
    world.projected[0][:] = 0
    world.check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", CACHES)
def test_heads_are_normed_before_they_are_rotated_and_stored(isa: str, dtype: str) -> None:
    model = Model(heads=2, kv_heads=1, head_dim=24, dtype=dtype)
    world = World(model, [7], [7])
    rng = np.random.default_rng(1)
    norms = [rng.uniform(0.5, 2, 24).astype(np.float32) for _ in range(2)]
    tokens = world.projected[0].copy()
    native.write_cache(
        native.kernels(isa), native.Pool(2), world.keys, world.values, 16, tokens, 2, world.cos,
        world.sin, np.arange(7, dtype=np.int32), world.slots(0, 0, 7), *norms, 1e-5,
    )  # fmt: skip
    heads = world.projected[0].reshape(7, 4, 24).astype(np.float64)
    weights = np.stack([norms[0], norms[0], norms[1]])
    heads[:, :3] /= np.sqrt((heads[:, :3] ** 2).mean(-1, keepdims=True) + 1e-5)
    heads[:, :3] *= weights
    world.projected[0] = heads.reshape(7, -1).astype(np.float32)
    query, key, value = world.rotated(0)
    np.testing.assert_allclose(tokens[:, :48].reshape(7, 2, 24), query, atol=1e-5)
    tile = world.slots(0, 0, 1)[0] // 16
    if dtype == "float32":
        stored = world.keys[tile, 0].reshape(24, 16).T[:7]
        np.testing.assert_allclose(stored, key[:, 0], atol=1e-5)
        stored = world.values[tile, 0].reshape(16, 24)[:7]
        np.testing.assert_array_equal(stored, value[:, 0])
    else:
        keys, values = world.keys[tile, 0], world.values[tile, 0]
        stored = keys[:384].reshape(12, 16, 2).transpose(1, 0, 2).reshape(16, 24)[:7]
        other = values[:384].reshape(8, 24, 2).transpose(0, 2, 1).reshape(16, 24)[:7]
        if dtype == "bfloat16":
            np.testing.assert_allclose(as_float(stored), key[:, 0], rtol=5e-3, atol=1e-6)
            np.testing.assert_array_equal(other, to_bf16(value[:, 0].astype(np.float32)))
            return
        for bytes_, cache, exact in ((stored, keys, key[:, 0]), (other, values, value[:, 0])):
            scales = cache[384:].view(np.float32)[:7, None]
            np.testing.assert_allclose(scales, np.abs(exact).max(1, keepdims=True) / 127, 1e-6)
            assert (np.abs(bytes_.astype(np.int32)).max(1) == 127).all()
            assert (np.abs(bytes_ * scales - exact) <= 0.501 * scales).all()


def as_float(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_arrays_that_do_not_fit_are_refused() -> None:
    world = World(Model(), [1], [40])
    kernels, pool = native.kernels(), native.Pool(1)
    starts, lens = np.array([0, 1], np.int32), np.array([40], np.int32)
    with pytest.raises(ValueError, match="context must hold its own tokens"):
        native.AttentionStep(np.array([0, 41], np.int32), lens, world.tables)
    with pytest.raises(ValueError, match="context_lens must be a contiguous int32 array"):
        native.AttentionStep(starts, np.array([40.0]), world.tables)
    query = np.zeros((1, 9, 64), np.float32)

    def attend(tables: npt.NDArray[np.int32], block_size: int = 16) -> None:
        step = native.AttentionStep(starts, lens, tables)
        native.attend(
            kernels, pool, step, world.keys, world.values, block_size, 64, query, query.copy()
        )

    with pytest.raises(ValueError, match="must name blocks of the cache"):
        attend(np.array([[0, 1, 99]], np.int32))
    with pytest.raises(ValueError, match="too narrow for a context"):
        attend(np.array([[0, 1]], np.int32))
    tight = np.zeros((6, 3, 16 * 64), np.int8)  # no room for scales
    step = native.AttentionStep(starts, lens, world.tables)
    with pytest.raises(ValueError, match=r"int8 array of shape \[6, 3, 1088\]"):
        native.attend(kernels, pool, step, tight, tight, 16, 64, query, query.copy())
    with pytest.raises(ValueError, match="block_size must be a multiple of 16"):
        attend(world.tables, 24)
