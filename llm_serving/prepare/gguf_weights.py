"""How do the tensors of a GGUF file become a safetensors file under Hugging Face's names?

In a stream: a few thousand rows at a time are dequantised to float32 by the `gguf` package, cast
and written, so that the memory needed does not grow with the model.

llama.cpp's converter turns the rows of LLaMA's query and key projections from Hugging Face's two
halves of a head into neighbouring pairs: row (head, half, i) is stored as row (head, i, half).
Here they are turned back; the Qwen architectures are stored as they are.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Quant
from gguf import dequantize

from llm_serving.errors import ConfigError
from llm_serving.model_card import Dtype, ModelConfig
from llm_serving.prepare.dtypes import CONTAINER_NAMES, cast
from llm_serving.prepare.gguf_file import GgufFile, GgufTensor
from llm_serving.prepare.progress import Progress
from llm_serving.prepare.safetensors_file import write_safetensors
from llm_serving.prepare.tensors import check_tensors, expected_tensors

__all__ = ["PLAIN", "convert_weights", "gguf_name", "stored_rows"]

PLAIN: dict[Quant, Dtype] = {Quant.F32: "float32", Quant.F16: "float16", Quant.BF16: "bfloat16"}
_SUPPORTED = {*PLAIN, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K}
_PIECE = 1 << 20  # elements dequantised at once; small enough for the caches

_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_UNUSED = ("rope_freqs.weight", "attn_rot_embd.weight")  # the first is part of the configuration

Rows = np.ndarray[Any, np.dtype[np.int64]]


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, suffix = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[inner]}.{suffix}"


def convert_weights(
    file: GgufFile,
    architecture: str,
    config: ModelConfig,
    dtype: Dtype,
    path: pathlib.Path,
    progress: Progress,
) -> None:
    """Write every tensor of the model to `path` as `dtype`.

    Raises ConfigError, naming the tensor, if one is missing, left over, of another shape, or of a
    type that is not supported.
    """
    shapes = expected_tensors(config)
    _check(file, architecture, config)
    total = sum(file.tensors[gguf_name(name)].data.nbytes for name in shapes)

    def pieces() -> Iterator[memoryview]:
        done = 0
        for name in shapes:
            tensor = file.tensors[gguf_name(name)]
            order = stored_rows(name, config) if architecture == "LlamaForCausalLM" else None
            for values, read in _float_pieces(tensor, order):
                done += read
                progress.advance(done, total)
                yield cast(values, dtype, name)

    write_safetensors(path, CONTAINER_NAMES[dtype], shapes, pieces())


def _check(file: GgufFile, architecture: str, config: ModelConfig) -> None:
    hf_names = {gguf_name(name): name for name in expected_tensors(config)}
    found = {
        hf_names.get(name, name): tensor.shape
        for name, tensor in file.tensors.items()
        if not name.endswith(_UNUSED)
    }
    check_tensors(found, config, str(file.path), architecture)
    for name, tensor in file.tensors.items():
        if tensor.type not in _SUPPORTED:
            known = ", ".join(sorted(kind.name for kind in _SUPPORTED))
            raise ConfigError(
                f"{file.path}: tensor {name} has type {tensor.type.name}, supported are {known}"
            )


def stored_rows(name: str, config: ModelConfig) -> Rows | None:
    """For each of Hugging Face's rows, where llama.cpp's converter put it; None: where it was."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return None
    stored = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return np.ascontiguousarray(stored.swapaxes(1, 2)).reshape(-1)


def _float_pieces(
    tensor: GgufTensor, order: Rows | None
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.float32]], int]]:
    """(float32 rows in `order`, bytes they were read from), a piece at a time."""
    if len(tensor.shape) == 1:
        values = dequantize(tensor.data, tensor.type).reshape(-1)
        yield np.ascontiguousarray(values if order is None else values[order]), tensor.data.nbytes
        return
    rows = len(tensor.data)
    step = max(1, _PIECE // tensor.shape[-1])
    for start in range(0, rows, step):
        taken = slice(start, start + step) if order is None else order[start : start + step]
        packed = tensor.data[taken]
        yield np.ascontiguousarray(dequantize(packed, tensor.type)), packed.nbytes
