"""The seam for linear layers, the plain linear layer behind it, and the norm.

A `LinearFactory` makes every linear layer of a model.  A fused layer knows its parts, whose
weights lie one below the other in the order given; a part's name is the prefix of its tensors in a
checkpoint.  So a factory may quantise, shard, outsource or adapt a layer, and the model above does
not change.

`tensors()` of a layer, here and elsewhere: checkpoint name -> the memory its values belong in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from llm_serving.kernels.interface import Kernels
from llm_serving.model_card import ModelConfig

__all__ = [
    "Embedding",
    "LayerPlan",
    "Linear",
    "LinearFactory",
    "LinearPart",
    "PlainEmbedding",
    "PlainLinear",
    "PlainLinears",
    "RmsNorm",
    "StepContext",
]


@dataclass(frozen=True, slots=True)
class LinearPart:
    name: str  # "model.layers.0.self_attn.q_proj"
    out_features: int
    has_bias: bool = False
    tied_to: torch.Tensor | None = None  # the weight [out, in] that this part shares


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[t, in] -> [t, out]."""

    def tensors(self) -> dict[str, torch.Tensor]: ...


class LinearFactory(Protocol):
    def __call__(
        self, name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]
    ) -> Linear: ...


class Embedding(Protocol):
    @property
    def weight(self) -> torch.Tensor | None:
        """[vocab, hidden] for a head that is tied to it; None: the head has its own."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[t] int64 -> [t, hidden]."""

    def tensors(self) -> dict[str, torch.Tensor]: ...


class StepContext(Protocol):
    """What all layers of one step share: where its tokens stand, and who attends to what."""

    def rotate_and_store(
        self, layer: int, query_key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Rotate [t, h + k, d], store keys and values [t, k, d]; the rotated queries [t, h, d]."""

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[t, h, d] attends to everything its row has stored: [t, h * d]."""


class LayerPlan(Protocol):
    """Layers that a backend carries out by itself, in one call."""

    def covers(self, start: int, stop: int) -> int:
        """How many of the layers from `start` on, up to `stop`, it carries out in a row."""

    def run(self, hidden: torch.Tensor, step: StepContext, start: int, stop: int) -> torch.Tensor:
        """The residual stream after layers [start, stop)."""

    has_head: bool

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """If it has the head: as `LlamaModel.logits`."""


class PlainEmbedding:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = torch.empty(shape, dtype=dtype, device=device)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"model.embed_tokens.weight": self.weight}


@dataclass(frozen=True, slots=True)
class PlainLinears:
    """Makes layers whose weights lie, unpacked, in this process."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device

    def __call__(
        self, name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]
    ) -> PlainLinear:
        tied = parts[0].tied_to
        if tied is None:
            shape = (out_features, in_features)
            weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            weight = tied
        bias = None
        if any(part.has_bias for part in parts):
            bias = torch.zeros(out_features, dtype=self.dtype, device=self.device)
        return PlainLinear(self.kernels, weight, bias, parts)


class PlainLinear:
    def __init__(
        self,
        kernels: Kernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[LinearPart],
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._parts = parts
        self._linear = kernels.linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        found, start = {}, 0
        for part in self._parts:
            end = start + part.out_features
            if part.tied_to is None:
                found[f"{part.name}.weight"] = self.weight[start:end]
            if part.has_bias and self.bias is not None:
                found[f"{part.name}.bias"] = self.bias[start:end]
            start = end
        return found


class RmsNorm:
    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self._name, self._eps = name, eps
        self._rms_norm, self._add_rms_norm = kernels.rms_norm, kernels.add_rms_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._rms_norm(x, self.weight, self._eps)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual + x, its norm)."""
        return self._add_rms_norm(x, residual, self.weight, self._eps)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{self._name}.weight": self.weight}
