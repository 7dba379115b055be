"""What all layers of one step share: turns of the positions, slots, and the attention's plan.

Built once a step, on the host, from arrays whose meaning `step_arrays` tells; the arrays may be
read-only and void after the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.kernels.interface import AttentionRows, Kernels, PagedAttention

__all__ = ["AttentionMetadata", "MetadataBuilder"]

Ints = npt.NDArray[np.int32]
LayerCache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, [slots, heads, dim]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    rotation: tuple[torch.Tensor, torch.Tensor]  # cos and sin [tokens, 1, head_dim], model's dtype
    slots: torch.Tensor  # [tokens] int64: where each token's key and value go
    attention: PagedAttention
    caches: Sequence[LayerCache]  # one a layer of the model
    kernels: Kernels

    def rotate_and_store(
        self, layer: int, query_key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Rotate [t, h + k, d], store keys and values [t, k, d]; the rotated queries [t, h, d]."""
        keys, values = self.caches[layer]
        return self.kernels.rotary_and_cache_write(
            query_key, value, self.rotation, self.slots, keys, values
        )

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[t, h, d] attends to everything its row has stored: [t, h * d]."""
        keys, values = self.caches[layer]
        return self.attention(query, keys, values)


class MetadataBuilder:
    def __init__(
        self,
        kernels: Kernels,
        table: tuple[torch.Tensor, torch.Tensor],
        caches: Sequence[LayerCache],
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        """`table`: float32 cos and sin [max_model_len, head_dim] of `models.rope`."""
        self._kernels = kernels
        self._cos, self._sin = table
        self._caches = caches
        self._block_size = block_size
        self._dtype = dtype
        self._device = table[0].device

    def build(
        self,
        positions: Ints,
        slots: Ints,
        query_starts: Ints,
        context_lens: Ints,
        block_tables: Ints,
    ) -> AttentionMetadata:
        rows = AttentionRows(query_starts, context_lens, block_tables, self._block_size)
        at = self._tensor(positions)
        rotation = (
            self._cos.index_select(0, at).to(self._dtype).unsqueeze(1),
            self._sin.index_select(0, at).to(self._dtype).unsqueeze(1),
        )
        attention = self._kernels.paged_attention(rows, self._dtype, self._device)
        return AttentionMetadata(
            rotation, self._tensor(slots), attention, self._caches, self._kernels
        )

    def _tensor(self, array: Ints) -> torch.Tensor:
        """A copy as int64: torch warns of arrays that it must not write."""
        return torch.from_numpy(array.astype(np.int64)).to(self._device)
