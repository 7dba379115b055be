"""What a LLaMA step needs from a machine: the one interface in front of all kernels.

`Kernels` lists the operations; a backend is a subclass that says its name.  One that can do only
some of them natively subclasses the reference and overrides those: what it lacks falls back, and
`backends()` tells which class answers for which operation.

Shapes: t tokens of a step in flat order, h query heads, k key-value heads, d the head's size,
s slots of a layer's cache (block * block_size + offset).  All floating tensors of a call share
one dtype.  Memory of the cache that was never written may hold anything, NaN included, so no
operation may let a slot outside a row's context touch a result.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["AttentionRows", "Kernels", "PagedAttention"]

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Which tokens attend to which slots, on the host; the same for every layer of a step."""

    query_starts: Ints  # [rows + 1] row i owns tokens query_starts[i] .. query_starts[i + 1]
    context_lens: Ints  # [rows] tokens visible to the row's last token, itself included
    block_tables: Ints  # [rows, width] blocks of each row's context; what lies behind it is unused
    block_size: int


class PagedAttention(Protocol):
    """Causal grouped-query attention of one step's rows, planned once, called by every layer."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """[t, h, d] attends to the cache [s, k, d]; scaled by d ** -0.5; [t, h * d]."""


class Kernels(abc.ABC):
    backend: ClassVar[str]

    def backends(self) -> dict[str, str]:
        """Operation -> name of the backend that carries it out."""
        names = {}
        for operation in sorted(Kernels.__abstractmethods__):
            owner = next(kind for kind in type(self).__mro__ if operation in vars(kind))
            names[operation] = str(vars(owner).get("backend", self.backend))
        return names

    @abc.abstractmethod
    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """[t, in] by [out, in] plus [out]: [t, out]."""

    @abc.abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension (Zhang, Sennrich 2019)."""

    @abc.abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual + x, rms_norm(residual + x)); neither argument is changed."""

    @abc.abstractmethod
    def rotary_and_cache_write(
        self,
        query_key: torch.Tensor,
        value: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Rotate queries and keys, store keys and values; the rotated queries [t, h, d].

        query_key [t, h + k, d], value [t, k, d]; rotation: cos and sin [t, 1, d], the first half
        of sin negated (see models.rope); token i goes to slots[i] of keys and values [s, k, d].
        """

    @abc.abstractmethod
    def paged_attention(
        self, rows: AttentionRows, dtype: torch.dtype, device: torch.device
    ) -> PagedAttention:
        """Plan a step's attention.  Every key of the step is written before it is called."""

    @abc.abstractmethod
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [t, 2 * n], gates first: [t, n]."""
