"""Small GGUF files, written with the format's own package as llama.cpp's converter writes them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant
from tokenizers.pre_tokenizers import ByteLevel

from llm_serving.model_card import ModelConfig
from llm_serving.prepare.gguf_weights import gguf_name
from llm_serving.prepare.tensors import expected_tensors

Array = np.ndarray[Any, Any]

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
# 256 bytes, three merged pieces, two tokens that are recognised in the text
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = [*sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "<|end|>", "<think>"]
TYPES = [1] * 259 + [3, 4]
END, THINK = 259, 260
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": END,
    "tokenizer.ggml.eos_token_id": END,
}


def metadata(config: ModelConfig = CONFIG, arch: str = "llama") -> dict[str, Any]:
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    return {f"{arch}.{key}": value for key, value in own.items()} | VOCABULARY


def random_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Array]:
    """float32 weights under Hugging Face's names."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape, np.float32)
        for name, shape in expected_tensors(config).items()
    }


def stored(name: str, weight: Array, config: ModelConfig, arch: str = "llama") -> Array:
    """`weight` with the rows of LLaMA's queries and keys where the converter puts them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if arch != "llama" or part not in heads:
        return weight
    halves = weight.reshape(heads[part], 2, config.head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def from_hf(
    tensors: Mapping[str, Array], config: ModelConfig = CONFIG, arch: str = "llama"
) -> dict[str, tuple[Array, Quant]]:
    """The same tensors under llama.cpp's names, in F32."""
    return {
        gguf_name(name): (stored(name, weight, config, arch), Quant.F32)
        for name, weight in tensors.items()
    }


def write_gguf(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[Array, Quant]],
    meta: Mapping[str, Any] | None = None,
    *,
    arch: str = "llama",
) -> pathlib.Path:
    """Raw bytes for a quantised type, else numbers; a key that is None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata(arch=arch) if meta is None else meta).items():
        _add(writer, key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
