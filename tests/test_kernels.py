"""Do the operations keep the promises of the interface, seen by their naive twins?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.errors import ConfigError
from llm_serving.kernels.interface import AttentionRows
from llm_serving.kernels.reference import ReferenceKernels
from llm_serving.kernels.reference_attention import MAX_GATHERED, MAX_PADDING, group_lengths
from llm_serving.kernels.selection import select_device, select_kernels

torch.set_num_threads(1)
KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
DIM, HEADS, KV_HEADS = 8, 6, 2


def naive_attention(
    rows: AttentionRows, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Token by token and head by head, as the definition says."""
    out = torch.empty(len(query), HEADS, DIM)
    for row, table in enumerate(rows.block_tables):
        first, end = rows.query_starts[row], rows.query_starts[row + 1]
        for token in range(first, end):
            seen = np.arange(rows.context_lens[row] - (end - token) + 1)
            slots = table[seen // rows.block_size] * rows.block_size + seen % rows.block_size
            for head in range(HEADS):
                kv_head = head * KV_HEADS // HEADS
                scores = keys[slots, kv_head] @ query[token, head] / DIM**0.5
                out[token, head] = torch.softmax(scores, 0) @ values[slots, kv_head]
    return out.flatten(1)


def random_rows(lengths: list[tuple[int, int]], block_size: int, num_blocks: int) -> AttentionRows:
    """Rows of (query tokens, context) over blocks in scrambled order."""
    free = list(np.random.default_rng(0).permutation(num_blocks))
    width = max(-(-context // block_size) for _, context in lengths)
    tables = np.full((len(lengths), width), -1, np.int32)
    for table, (_, context) in zip(tables, lengths, strict=True):
        for i in range(-(-context // block_size)):
            table[i] = free.pop()
    starts = np.cumsum([0] + [num for num, _ in lengths]).astype(np.int32)
    contexts = np.array([context for _, context in lengths], np.int32)
    return AttentionRows(starts, contexts, tables, block_size)


def written_cache(rows: AttentionRows, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with numbers only where a row's context is, and NaN everywhere else."""
    shape = (num_blocks * rows.block_size, KV_HEADS, DIM)
    cache = torch.full((2, *shape), torch.nan)
    for table, context in zip(rows.block_tables, rows.context_lens, strict=True):
        seen = np.arange(context)
        slots = table[seen // rows.block_size] * rows.block_size + seen % rows.block_size
        cache[:, slots] = torch.randn(2, int(context), KV_HEADS, DIM)
    return cache[0], cache[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 9, 40]), st.integers(0, 40)), min_size=1, max_size=7
    ),
    block_size=st.integers(1, 17),
    tile=st.sampled_from([1, 4, 256]),
    max_padding=st.sampled_from([0, 20, MAX_PADDING]),
)
def test_attention_is_that_of_the_definition_though_all_other_memory_is_nan(
    lengths: list[tuple[int, int]], block_size: int, tile: int, max_padding: int
) -> None:
    torch.manual_seed(0)
    rows = random_rows([(num, num + before) for num, before in lengths], block_size, 600)
    keys, values = written_cache(rows, 600)
    query = torch.randn(int(rows.query_starts[-1]), HEADS + KV_HEADS, DIM)[:, :HEADS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_serving.kernels.reference_attention.TILE", tile)
        patch.setattr("llm_serving.kernels.reference_attention.MAX_PADDING", max_padding)
        found = KERNELS.paged_attention(rows, torch.float32, CPU)(query, keys, values)
    torch.testing.assert_close(found, naive_attention(rows, query, keys, values))


def test_a_plan_reads_arrays_that_it_must_not_write() -> None:
    rows = random_rows([(1, 5), (3, 9), (1, 2)], 4, 20)
    for array in (rows.query_starts, rows.context_lens, rows.block_tables):
        array.flags.writeable = False
    keys, values = written_cache(rows, 20)
    found = KERNELS.paged_attention(rows, torch.float32, CPU)(
        torch.randn(5, HEADS, DIM), keys, values
    )
    assert found.isfinite().all()


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=70))
def test_groups_of_decode_rows_waste_little_and_stay_small(lengths: list[int]) -> None:
    array = np.array(lengths, np.int32)
    groups = group_lengths(array)
    assert sorted(int(i) for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert (np.diff(group) > 0).all()
        longest = int(array[group].max())
        assert len(group) == 1 or longest * len(group) <= MAX_GATHERED
        # Row i of n was taken at a price of at most MAX_PADDING / (n - i); 1 + .. + 1/70 < 5.
        assert longest * len(group) - int(array[group].sum()) <= MAX_PADDING * 5


def test_rows_of_like_length_are_one_group_and_an_outlier_its_own() -> None:
    like = np.array([250 + i % 7 for i in range(32)], np.int32)
    assert [len(group) for group in group_lengths(like)] == [32]
    like[9] = 8000
    assert [list(group)[:2] for group in group_lengths(like)] == [[9], [0, 1]]


def test_rms_norm_and_its_sum_are_those_of_the_definition() -> None:
    x, residual, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(12)
    before = residual.clone()
    total, normed = KERNELS.add_rms_norm(x, residual, weight, 1e-3)
    expected = (x + before) / ((x + before).pow(2).mean(1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(total, x + before)
    assert torch.equal(residual, before)
    assert torch.equal(KERNELS.rms_norm(total, weight, 1e-3), normed)


def test_pairs_are_turned_and_keys_and_values_land_in_their_slots() -> None:
    query_key, value = torch.randn(3, HEADS + KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)
    keys, values = torch.zeros(2, 10, KV_HEADS, DIM)
    angles = torch.rand(3, 1, DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    slots = torch.tensor([7, 0, 4])
    query = KERNELS.rotary_and_cache_write(query_key, value, rotation, slots, keys, values)
    first, second = query_key.chunk(2, -1)
    turned = torch.view_as_real(torch.complex(first, second) * torch.complex(cos, sin))
    expected = torch.cat((turned[..., 0], turned[..., 1]), -1)
    torch.testing.assert_close(query, expected[:, :HEADS])
    torch.testing.assert_close(keys[slots], expected[:, HEADS:])
    assert torch.equal(values[slots], value)
    untouched = [i for i in range(10) if i not in slots]
    assert not keys[untouched].any()
    assert not values[untouched].any()


def test_the_gate_is_the_first_half() -> None:
    gate, up = torch.randn(2, 4), torch.randn(2, 4)
    found = KERNELS.silu_and_mul(torch.cat((gate, up), 1))
    torch.testing.assert_close(found, gate / (1 + (-gate).exp()) * up)


def test_a_linear_layer_adds_its_bias() -> None:
    x, weight, bias = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    torch.testing.assert_close(KERNELS.linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(KERNELS.linear(x, weight, None), x @ weight.T)


def test_every_operation_names_the_backend_that_carries_it_out() -> None:
    class Native(ReferenceKernels):
        backend = "native"

        def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super().silu_and_mul(gate_up)

    names = select_kernels(CPU).backends()
    assert set(names.values()) == {"reference"}
    assert set(names) == {
        "add_rms_norm",
        "linear",
        "paged_attention",
        "rms_norm",
        "rotary_and_cache_write",
        "silu_and_mul",
    }
    assert Native().backends() == names | {"silu_and_mul": "native"}


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="device: "):
        select_device(name)


def test_the_devices_that_are_there_are_found() -> None:
    assert select_device("cpu") == CPU
    assert select_device("auto").type in ("cpu", "cuda")
