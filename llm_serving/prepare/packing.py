"""Weights into the form that the native kernels multiply with, once, when a model is prepared.

A fused layer is packed from its parts' rows as they stand in the source: the blocks of a GGUF file
are kept as they are (`native`), anything else goes through float32.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_serving.kernels.cpu.native import native
from llm_serving.kernels.cpu.packed_file import PackedWriter
from llm_serving.model_card import ModelConfig, Weights
from llm_serving.prepare.progress import Progress

__all__ = ["PACKED", "RowSource", "pack_model"]

PACKED = "model.packed"

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_FORMATS: dict[Weights, str] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1")
_PIECE = 1 << 22  # elements in float32 at a time
_HALF = 16  # rows of gates, then of up-projections, that stand side by side


class RowSource(Protocol):
    """The tensors of a checkpoint, under Hugging Face's names, rows in Hugging Face's order."""

    def kind(self, name: str) -> str:
        """How the rows are stored: F32, BF16, Q8_0, Q4_0, Q4_1, or another name."""

    def raw(self, name: str, rows: npt.NDArray[np.intp]) -> Bytes:
        """Some rows as they are stored, [rows, bytes of a row]."""

    def floats(self, name: str, rows: npt.NDArray[np.intp]) -> Floats:
        """Some rows in float32, [rows, columns]; of a vector [rows]."""

    def blocks(self, name: str, rows: npt.NDArray[np.intp], kind: str) -> Bytes:
        """Some rows in blocks of that kind, converted if they are not."""

    def block_kind(self, name: str) -> str:
        """The kind of block that loses nothing worth mentioning of it; BF16 if it has none."""


@dataclass(frozen=True, slots=True)
class _Linear:
    name: str
    in_features: int
    parts: Sequence[tuple[str, int]]  # name of the checkpoint's layer, rows
    has_bias: bool
    is_interleaved: bool = False  # two parts, by half panels

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)

    def order(self) -> list[tuple[str, npt.NDArray[np.intp]]]:
        """Runs of rows, from the first output to the last."""
        if not self.is_interleaved:
            return [(name, np.arange(rows)) for name, rows in self.parts]
        (gate, rows), (up, _) = self.parts
        return [
            (name, np.arange(start, start + _HALF))
            for start in range(0, rows, _HALF)
            for name in (gate, up)
        ]


def pack_model(
    source: RowSource, config: ModelConfig, weights: Weights, path: pathlib.Path, progress: Progress
) -> None:
    """Write the packed weights of a whole model to `path`."""
    pool = native().Pool(len(os.sched_getaffinity(0)))
    writer = PackedWriter(path)
    every = np.arange(config.vocab_size)
    _add_embedding(writer, source, every, config)
    linears = _linears(config)
    for number, linear in enumerate(linears):
        progress.advance(number, len(linears))
        _add_linear(writer, pool, source, linear, weights)
    for name, size in _vectors(config).items():
        vector = source.floats(name, np.arange(size)).reshape(-1)
        writer.add(name, "vector", "F32", (size,), iter([vector.astype("<f4").view(np.uint8)]))
    writer.close()
    progress.advance(len(linears), len(linears))


def _linears(config: ModelConfig) -> list[_Linear]:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    found = []
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv = [
            (f"{attention}.{part}_proj", size)
            for part, size in zip("qkv", (queries, keys, keys), strict=True)
        ]
        gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
        found += [
            _Linear(f"{attention}.qkv_proj", hidden, qkv, config.qkv_bias),
            _Linear(
                f"{attention}.o_proj", queries, [(f"{attention}.o_proj", hidden)], config.o_bias
            ),
            _Linear(f"{mlp}.gate_up_proj", hidden, gate_up, config.mlp_bias, is_interleaved=True),
            _Linear(f"{mlp}.down_proj", inner, [(f"{mlp}.down_proj", hidden)], config.mlp_bias),
        ]
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    found.append(_Linear("lm_head", hidden, [(head, config.vocab_size)], has_bias=False))
    return found


def _vectors(config: ModelConfig) -> dict[str, int]:
    found = {"model.norm.weight": config.hidden_size}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = config.hidden_size
        found[f"{prefix}.post_attention_layernorm.weight"] = config.hidden_size
        if config.qk_norm:
            found[f"{prefix}.self_attn.q_norm.weight"] = config.head_dim
            found[f"{prefix}.self_attn.k_norm.weight"] = config.head_dim
    return found


def _add_embedding(
    writer: PackedWriter, source: RowSource, every: npt.NDArray[np.intp], config: ModelConfig
) -> None:
    name = "model.embed_tokens.weight"
    kind = source.kind(name)
    as_stored = kind in ("F32", "BF16", *_BLOCKS)
    step = max(1, _PIECE // config.hidden_size)

    def pieces() -> Iterator[Bytes]:
        for start in range(0, len(every), step):
            rows = every[start : start + step]
            if as_stored:
                yield np.ascontiguousarray(source.raw(name, rows)).reshape(-1)
            else:
                yield source.floats(name, rows).astype("<f4").reshape(-1).view(np.uint8)

    shape = (config.vocab_size, config.hidden_size)
    writer.add(name, "rows", kind if as_stored else "F32", shape, pieces())


def _add_linear(
    writer: PackedWriter, pool: Any, source: RowSource, linear: _Linear, weights: Weights
) -> None:
    module = native()
    format = _format(source, linear, weights)
    n, k = linear.out_features, linear.in_features
    kind = getattr(module.Format, format)
    packed = _aligned(module.packed_bytes(kind, n, k))
    first = 0
    for names, rows in _pieces(linear):
        if format in _BLOCKS:
            block = getattr(module.Source, format)
            data = _interleave([source.blocks(f"{each}.weight", rows, format) for each in names])
        else:
            block = module.Source.F32
            floats = [source.floats(f"{each}.weight", rows) for each in names]
            data = _interleave([np.ascontiguousarray(part).view(np.uint8) for part in floats])
        module.pack(pool, kind, block, data, packed, n, k, first)
        first += len(data)
    bias = _bias(source, linear) if linear.has_bias else None
    writer.add(linear.name, "linear", format, (n, k), iter([packed]), bias)


def _pieces(linear: _Linear) -> Iterator[tuple[list[str], npt.NDArray[np.intp]]]:
    """Pieces of rows, whole panels each but the last of a part: (layers side by side, rows)."""
    step = max(32, _PIECE // linear.in_features // 32 * 32)
    if linear.is_interleaved:
        names = [name for name, _ in linear.parts]
        rows = linear.parts[0][1]
        for start in range(0, rows, step):
            yield names, np.arange(start, min(start + step, rows))
        return
    for name, rows in linear.parts:
        for start in range(0, rows, step):
            yield [name], np.arange(start, min(start + step, rows))


def _interleave(parts: Sequence[Bytes]) -> Bytes:
    """[rows, bytes] of each part -> 16 rows of the first, 16 of the second, and so on."""
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    width = parts[0].shape[1]
    halves = [part.reshape(-1, _HALF, width) for part in parts]
    return np.ascontiguousarray(np.stack(halves, 1).reshape(-1, width))


def _bias(source: RowSource, linear: _Linear) -> Floats:
    parts = [
        source.floats(f"{name}.bias", np.arange(rows)).reshape(-1, 1).astype("<f4")
        for name, rows in linear.parts
    ]
    if not linear.is_interleaved:
        return np.concatenate(parts).reshape(-1)
    joined = _interleave([part.view(np.uint8) for part in parts])
    found: Floats = joined.view("<f4").reshape(-1)
    return found


def _format(source: RowSource, linear: _Linear, weights: Weights) -> str:
    if weights != "native":
        return _FORMATS[weights]
    kinds = {source.block_kind(f"{name}.weight") for name, _ in linear.parts}
    if kinds == {"F32"} or kinds == {"BF16"}:
        return kinds.pop()
    if len(kinds) == 1 and linear.in_features % 32 == 0:
        return kinds.pop()
    return "Q8_0" if "BF16" not in kinds and "F32" not in kinds else "BF16"


def _aligned(size: int) -> Bytes:
    """Zeros at a multiple of 64 bytes."""
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]
