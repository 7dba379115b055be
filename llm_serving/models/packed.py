"""A model whose weights are packed for the native CPU kernels, and the plan that runs its layers.

Everything between the operations is float32; what a linear layer multiplies with, and what the
cache holds, is the kernels' own.  A layer whose linears are all packed is part of the plan, one
native call for a run of layers; any other runs operation by operation over the same cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.digest import Digest
from llm_serving.kernels.cpu.packed_file import PackedFile
from llm_serving.model_card import ModelConfig
from llm_serving.models.layers import LinearFactory, LinearPart, RmsNorm, StepContext
from llm_serving.models.llama import LlamaModel

__all__ = [
    "NativePlan",
    "NativeStep",
    "NativeSteps",
    "PackedEmbedding",
    "PackedLinear",
    "PackedLinears",
    "load_packed",
]

Ints = npt.NDArray[np.int32]
_KV_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
_HALF = 16  # gates, then up-projections, side by side in a packed gate_up


class PackedEmbedding:
    weight = None

    def __init__(self, file: PackedFile, kernels: NativeKernels) -> None:
        name = "model.embed_tokens.weight"
        part = file.part(name)
        self._rows = file.data(name).reshape(part.shape[0], -1)
        self._width = part.shape[1]
        self._source = getattr(kernels.module.Source, part.format)
        self._unpack = kernels.module.unpack

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        values = np.empty((len(ids), self._width), np.float32)
        self._unpack(self._source, self._rows, ids.numpy().astype(np.int32), values)
        return torch.from_numpy(values)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


class PackedLinear:
    """Its weight lies in the mapped file."""

    def __init__(self, kernels: NativeKernels, file: PackedFile, name: str) -> None:
        part = file.part(name)
        kind = getattr(kernels.module.Format, part.format)
        self.packed = kernels.module.PackedWeight(
            kind, *part.shape, file.data(name), file.bias(name)
        )
        self._kernels, self._out = kernels, part.shape[0]
        self._is_interleaved = name.endswith("gate_up_proj")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(x), self._out)
        kernels = self._kernels
        kernels.module.linear(
            kernels.kernels, kernels.pool, self.packed, x.contiguous().numpy(), y.numpy()
        )
        if self._is_interleaved:
            y = y.view(len(x), -1, 2, _HALF).transpose(1, 2).flatten(1)
        return y

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


@dataclass(frozen=True, slots=True)
class PackedLinears:
    """A `LinearFactory` over a file of packed weights."""

    kernels: NativeKernels
    file: PackedFile

    def __call__(
        self, name: str, in_features: int, out_features: int, parts: Sequence[LinearPart]
    ) -> PackedLinear:
        found = self.file.part(name).shape
        if found != (out_features, in_features):
            raise ConfigError(
                f"{self.file.path}: {name} has shape {list(found)}, the config says "
                f"{[out_features, in_features]}; prepare the model again"
            )
        return PackedLinear(self.kernels, self.file, name)


def load_packed(
    file: PackedFile,
    config: ModelConfig,
    kernels: NativeKernels,
    linears: LinearFactory | None = None,
) -> LlamaModel:
    """The model of a packed file; linears of another factory are the caller's to fill."""
    factory = linears or PackedLinears(kernels, file)
    cpu = torch.device("cpu")
    embedding = PackedEmbedding(file, kernels)
    model = LlamaModel(config, factory, kernels, torch.float32, cpu, embedding)
    for name, tensor in model.tensors().items():
        if name in file.parts:
            tensor.copy_(torch.from_numpy(file.vector(name).copy()))
        elif linears is None:
            raise ConfigError(f"{file.path} has no {name}; prepare the model again")
    return model


class NativePlan:
    """A `LayerPlan`: every layer whose linears are packed."""

    def __init__(
        self,
        model: LlamaModel,
        config: ModelConfig,
        kernels: NativeKernels,
        table: tuple[torch.Tensor, torch.Tensor],
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        block_size: int,
    ) -> None:
        """`table`: of models.rope; `caches`: the memory of each layer's keys and values."""
        cos, sin = (part.contiguous().numpy() for part in table)
        self._module = kernels.module
        self._plan = kernels.module.Plan(
            kernels.kernels,
            kernels.pool,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            eps=config.rms_norm_eps,
            block_size=block_size,
            kv_format=getattr(kernels.module.KvFormat, _KV_FORMATS[caches[0][0].dtype]),
            cos=cos,
            sin=sin,
        )
        self._place: dict[int, int] = {}  # layer of the model -> layer of the plan
        for index, layer in enumerate(model.layers):
            linears = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
            packed = [each.packed for each in linears if isinstance(each, PackedLinear)]
            if len(packed) < len(linears):
                continue
            qkv, out, gate_up, down = packed
            query_norm, key_norm = _head_norms(layer.attention.head_norms)
            self._plan.add_layer(
                input_norm=_numbers(layer.input_norm),
                qkv=qkv,
                out=out,
                post_norm=_numbers(layer.post_attention_norm),
                gate_up=gate_up,
                down=down,
                query_norm=query_norm,
                key_norm=key_norm,
            )
            self._place[index] = len(self._place)
        mine = [caches[index] for index in self._place]
        addresses = [(keys.data_ptr(), values.data_ptr()) for keys, values in mine]
        self._plan.set_cache(addresses, len(caches[0][0]) // block_size)
        self.has_every_layer = len(self._place) == len(model.layers)
        self.has_head = isinstance(model.head, PackedLinear)
        if isinstance(model.head, PackedLinear):
            self._plan.set_head(_numbers(model.norm), model.head.packed)
        self._vocab_size = config.vocab_size
        self._caches = caches  # keeps their memory

    @property
    def native(self) -> Any:
        """The extension module's own plan."""
        return self._plan

    def covers(self, start: int, stop: int) -> int:
        count = 0
        while start + count < stop and start + count in self._place:
            count += 1
        return count

    def run(self, hidden: torch.Tensor, step: StepContext, start: int, stop: int) -> torch.Tensor:
        """In place: the residual stream belongs to the step."""
        first = self._place[start]
        self._plan.run_layers(hidden.numpy(), first, first + stop - start)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(len(hidden), self._vocab_size)
        self.head(hidden, np.arange(len(hidden), dtype=np.int32), logits)
        return logits

    def head(
        self,
        hidden: torch.Tensor,
        rows: Ints,
        logits: torch.Tensor | None,
        records: npt.NDArray[np.void] | None = None,
    ) -> Digest:
        """Some rows of hidden through the head: what their logits amount to.

        The logits themselves, float32 [num_rows, vocab], are kept only if there is room for them.
        `records` [num_rows] SAMPLING_DTYPE are what the rows will be asked.
        """
        digest = Digest.empty(self._module, len(rows), self._vocab_size, logits is not None)
        asked = None
        if records is not None:
            asked = records.view(np.uint8).reshape(len(rows), records.itemsize)
        self._plan.head(
            hidden.numpy(),
            rows,
            asked,
            digest.columns(),
            None if logits is None else logits.numpy(),
            digest.maxima,
        )
        return digest


def _head_norms(
    norms: Sequence[RmsNorm],
) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.float32] | None]:
    if not norms:
        return None, None
    query, key = norms
    return _numbers(query), _numbers(key)


def _numbers(norm: RmsNorm) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = norm.weight.numpy()
    return found


class NativeStep:
    """A `StepContext` over the native cache; the plan of the step has been begun with it."""

    def __init__(
        self,
        kernels: NativeKernels,
        table: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
        caches: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
        block_size: int,
        arrays: tuple[Ints, Ints, Ints, Ints, Ints],
    ) -> None:
        self._kernels, self._table, self._caches = kernels, table, caches
        self._block_size = block_size
        self._positions, self._slots, *rows = arrays
        self._rows = rows
        self._step: Any = None

    def rotate_and_store(
        self, layer: int, query_key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        tokens, heads, dim = query_key.shape
        num_queries = heads - value.shape[1]
        projected = torch.cat((query_key, value), 1).reshape(tokens, -1)
        keys, values = self._caches[layer]
        self._kernels.module.write_cache(
            self._kernels.kernels,
            self._kernels.pool,
            keys,
            values,
            self._block_size,
            projected.numpy(),
            num_queries,
            *self._table,
            self._positions,
            self._slots,
        )
        return projected.view(tokens, -1, dim)[:, :num_queries]

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        if self._step is None:
            self._step = self._kernels.module.AttentionStep(*self._rows)
        out = torch.empty(query.shape)
        keys, values = self._caches[layer]
        self._kernels.module.attend(
            self._kernels.kernels,
            self._kernels.pool,
            self._step,
            keys,
            values,
            self._block_size,
            query.shape[2],
            query.contiguous().numpy(),
            out.numpy(),
        )
        return out.flatten(1)


class NativeSteps:
    """Makes a `NativeStep` of a step's arrays."""

    def __init__(
        self,
        kernels: NativeKernels,
        plan: NativePlan,
        table: tuple[torch.Tensor, torch.Tensor],
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        block_size: int,
    ) -> None:
        self._kernels, self._plan, self._block_size = kernels, plan, block_size
        self._table = (table[0].contiguous().numpy(), table[1].contiguous().numpy())
        self._caches = [(_tiles(keys), _tiles(values)) for keys, values in caches]

    def build(
        self,
        positions: Ints,
        slots: Ints,
        query_starts: Ints,
        context_lens: Ints,
        block_tables: Ints,
        lasting: Ints | None = None,
    ) -> NativeStep:
        """The arrays may be read-only, and must stay as they are until the step has run.

        `lasting`: the only tokens whose hidden states are wanted after the last layer, rising.
        """
        arrays = (positions, slots, query_starts, context_lens, block_tables)
        self._plan.native.begin(*arrays, lasting if self._plan.has_every_layer else None)
        return NativeStep(self._kernels, self._table, self._caches, self._block_size, arrays)


def _tiles(cache: torch.Tensor) -> npt.NDArray[Any]:
    """[slots, heads, width] as the kernels see it: [tiles, heads, 16 * width], no bfloat16."""
    slots, heads, width = cache.shape
    raw = cache.view(torch.uint16) if cache.dtype is torch.bfloat16 else cache
    found: npt.NDArray[Any] = raw.reshape(slots // 16, heads, 16 * width).numpy()
    return found
