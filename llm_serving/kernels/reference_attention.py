"""Paged attention in plain torch: which slots to gather, and how to mask them, once a step.

Rows with one query token (decode) are attended in groups of like length: their contexts are
gathered and padded to the longest.  A padded place repeats the row's own last slot, because memory
that was never written may hold NaN, and 0 * NaN is NaN.  Every longer row (a prompt chunk) gathers
exactly its context and attends alone, in tiles of queries so that the mask stays small.

Query heads that share a key-value head stand in a dimension of their own, [.., k, g, d], so that
keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from llm_serving.kernels.interface import AttentionRows, PagedAttention

__all__ = ["plan_attention"]

Ints = npt.NDArray[np.int32]

# Padding a group costs about 0.1 us a place and layer, another call 50 to 150 us.
MAX_PADDING = 1024  # places that all shorter rows would waste, before a new group begins
MAX_GATHERED = 16384  # places of a group: what is gathered is a copy of that part of the cache
TILE = 256  # queries of a prompt chunk that attend in one call


def plan_attention(rows: AttentionRows, dtype: torch.dtype, device: torch.device) -> PagedAttention:
    counts = np.diff(rows.query_starts)
    decode, prefill = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
    parts: list[_DecodeGroup | _PrefillRow] = [
        _plan_group(rows, decode[group], dtype, device)
        for group in group_lengths(rows.context_lens[decode])
    ]
    if len(prefill):
        master = _causal_mask(rows, prefill, dtype, device)
        parts += [_plan_prefill(rows, int(row), master, device) for row in prefill]
    return _ReferenceAttention(parts)


def group_lengths(lengths: Ints) -> list[npt.NDArray[np.intp]]:
    """Indices of rows to attend together, each group in ascending order.

    Longest first; a group ends where going on would pad more than a further call costs.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, begin = [], 0
    for i in range(1, len(order) + 1):
        longest = int(lengths[order[begin]])
        if i < len(order):
            padding = (longest - int(lengths[order[i]])) * (len(order) - i)
            if padding <= MAX_PADDING and longest * (i + 1 - begin) <= MAX_GATHERED:
                continue
        groups.append(np.sort(order[begin:i]))
        begin = i
    return groups


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    tokens: torch.Tensor | slice  # n of the step
    slots: torch.Tensor  # [n * longest]
    mask: torch.Tensor | None  # [n, 1, 1, longest] added to the scores; None: all equally long

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        num_kv_heads, head_dim = keys.shape[1:]
        queries = query[self.tokens]
        queries = queries.view(len(queries), num_kv_heads, -1, head_dim)
        shape = (len(queries), -1, num_kv_heads, head_dim)
        k = keys.index_select(0, self.slots).view(shape).transpose(1, 2)
        v = values.index_select(0, self.slots).view(shape).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(queries, k, v, self.mask)
        out[self.tokens] = attended.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    """Tile i: the row's tokens tiles[i], its first context length, and its mask (None: causal)."""

    slots: torch.Tensor  # [context]
    tiles: list[tuple[slice, int, torch.Tensor | None]]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        num_kv_heads, head_dim = keys.shape[1:]
        queries_per_head = query.shape[1] // num_kv_heads
        k = keys.index_select(0, self.slots).transpose(0, 1).unsqueeze(1)
        v = values.index_select(0, self.slots).transpose(0, 1).unsqueeze(1)
        for tokens, num_visible, mask in self.tiles:
            queries = query[tokens].view(-1, num_kv_heads, queries_per_head, head_dim)
            attended = functional.scaled_dot_product_attention(
                queries.permute(1, 2, 0, 3),
                k[:, :, :num_visible].expand(-1, queries_per_head, -1, -1),
                v[:, :, :num_visible].expand(-1, queries_per_head, -1, -1),
                mask,
                is_causal=mask is None,
            )
            out[tokens] = attended.flatten(0, 1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _ReferenceAttention:
    parts: Sequence[_DecodeGroup | _PrefillRow]

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in self.parts:
            part.attend(query, keys, values, out)
        return out.flatten(1)


def _plan_group(
    rows: AttentionRows, group: npt.NDArray[np.intp], dtype: torch.dtype, device: torch.device
) -> _DecodeGroup:
    lengths = rows.context_lens[group]
    longest = int(lengths.max())
    slots = _slots(rows, group, longest)
    is_padding = np.arange(longest) >= lengths[:, None]
    last = slots[np.arange(len(group)), lengths - 1]
    np.copyto(slots, last[:, None], where=is_padding)
    mask = None
    if is_padding.any():
        bias = torch.zeros(is_padding.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(is_padding), -torch.inf)
        mask = bias[:, None, None].to(device)
    tokens: Ints = rows.query_starts[group]
    first, end = int(tokens[0]), int(tokens[-1]) + 1
    in_one_piece = end - first == len(tokens)
    return _DecodeGroup(
        tokens=slice(first, end)
        if in_one_piece
        else torch.from_numpy(tokens.astype(np.int64)).to(device),
        slots=torch.from_numpy(slots.reshape(-1)).to(device),
        mask=mask,
    )


def _plan_prefill(
    rows: AttentionRows, row: int, master: torch.Tensor, device: torch.device
) -> _PrefillRow:
    first, end = int(rows.query_starts[row]), int(rows.query_starts[row + 1])
    context = int(rows.context_lens[row])
    slots = torch.from_numpy(_slots(rows, np.array([row]), context)[0]).to(device)
    if context == end - first:
        return _PrefillRow(slots, [(slice(first, end), context, None)])
    tiles: list[tuple[slice, int, torch.Tensor | None]] = []
    for start in range(first, end, TILE):
        stop = min(start + TILE, end)
        num_visible = context - (end - stop)
        mask = master[TILE - (stop - start) :, master.shape[1] - num_visible :]
        tiles.append((slice(start, stop), num_visible, mask))
    return _PrefillRow(slots, tiles)


def _causal_mask(
    rows: AttentionRows,
    prefill: npt.NDArray[np.intp],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """The mask of TILE queries at the end of the longest context, [TILE, longest].

    That of n queries at the end of m tokens is its lower right corner [n, m].
    """
    counts = rows.query_starts[prefill + 1] - rows.query_starts[prefill]
    contexts = rows.context_lens[prefill]
    longest = int(contexts[contexts > counts].max(initial=0))
    hidden = torch.full((TILE, longest), -torch.inf, dtype=dtype, device=device)
    return hidden.triu_(longest - TILE + 1)


def _slots(rows: AttentionRows, which: npt.NDArray[np.intp], num_tokens: int) -> Ints:
    """Slots of the first `num_tokens` places of some rows; what lies behind a context is junk."""
    num_blocks = -(-num_tokens // rows.block_size)
    blocks = rows.block_tables[which, :num_blocks]
    offsets = np.arange(rows.block_size, dtype=np.int32)
    slots: Ints = np.add(blocks[:, :, None] * np.int32(rows.block_size), offsets, dtype=np.int32)
    return slots.reshape(len(which), -1)[:, :num_tokens]
