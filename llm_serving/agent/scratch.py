"""Memory to work in, kept from step to step.

A fresh tensor of megabytes costs more in page faults than most of the arithmetic done in it.
"""

from __future__ import annotations

import math

import torch

__all__ = ["Scratch"]


class Scratch:
    """Tensors by name.  What one holds is anybody's guess until it is written."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def like(
        self, tensor: torch.Tensor, name: str, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """A contiguous tensor of the shape of `tensor`; the one that had this name is void."""
        key = (name, dtype, tensor.device)
        size = math.prod(tensor.shape)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=dtype, device=tensor.device)
            self._buffers[key] = buffer
        return buffer[:size].view(tensor.shape)
