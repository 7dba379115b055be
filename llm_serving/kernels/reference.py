"""Every operation in plain torch: works on every device, and is the oracle of the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from llm_serving.kernels.interface import AttentionRows, Kernels, PagedAttention
from llm_serving.kernels.reference_attention import plan_attention

__all__ = ["ReferenceKernels"]


class ReferenceKernels(Kernels):
    backend: ClassVar[str] = "reference"

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return total, functional.rms_norm(total, weight.shape, weight, eps)

    def rotary_and_cache_write(
        self,
        query_key: torch.Tensor,
        value: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        cos, sin = rotation
        halves_swapped = torch.roll(query_key, query_key.shape[-1] // 2, -1)
        rotated = torch.addcmul(query_key * cos, halves_swapped, sin)
        num_query_heads = query_key.shape[1] - value.shape[1]
        keys.index_copy_(0, slots, rotated[:, num_query_heads:])
        values.index_copy_(0, slots, value)
        return rotated[:, :num_query_heads]

    def paged_attention(
        self, rows: AttentionRows, dtype: torch.dtype, device: torch.device
    ) -> PagedAttention:
        return plan_attention(rows, dtype, device)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up
