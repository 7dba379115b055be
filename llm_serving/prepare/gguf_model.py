"""Which model is in a GGUF file, in our words?

The metadata of architectures llama, qwen2 and qwen3 becomes a ModelConfig; biases, q/k norms and
a head of its own are told from the tensors.  A key of the architecture that is not known here is
refused by name, for it may change what the model computes.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.gguf_rope import read_rope
from llm_serving.prepare.json_file import Fields

__all__ = ["main_type", "read_gguf_model"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE = ["dimension_count", "freq_base", "scale_linear"]
_SCALING = ["type", "factor", "attn_factor", "original_context_length", "finetuned"]
_YARN = ["ext_factor", "attn_factor", "beta_fast", "beta_slow"]
_ATTENTION = ["head_count", "head_count_kv", "key_length", "value_length", "sliding_window"]
_KNOWN = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *(f"attention.{key}" for key in [*_ATTENTION, "layer_norm_rms_epsilon"]),
    *(f"rope.{key}" for key in _ROPE),
    *(f"rope.scaling.{key}" for key in _SCALING),
    *(f"rope.scaling.yarn_{key}" for key in _YARN),
}
_INERT = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (True,),  # of other architectures; old converters wrote it anyway
    "tensor_data_layout": ("Meta AI original pth",),
    "attention.causal": (True,),
    "pooling_type": (0,),
}


def read_gguf_model(file: GgufFile) -> tuple[str, ModelConfig]:
    """(architecture, hyperparameters).  ConfigError names what is missing or not supported."""
    general = Fields(file.metadata, str(file.path))
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise general.unsupported("general.architecture", " or ".join(_ARCHITECTURES))
    if (general.optional_integer("split.count") or 1) > 1:
        raise general.unsupported("split.count", "one file (join them with gguf-split --merge)")
    meta = _own_keys(file, arch)
    return _ARCHITECTURES[arch], _read_config(file, meta)


def main_type(file: GgufFile) -> str:
    """The tensor type that most of the file's numbers have: "Q4_1"."""
    elements: Counter[str] = Counter()
    for tensor in file.tensors.values():
        elements[tensor.type.name] += tensor.num_elements
    return elements.most_common(1)[0][0]


def _own_keys(file: GgufFile, arch: str) -> Fields:
    """The architecture's keys without their prefix."""
    prefix = f"{arch}."
    own = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    meta = Fields(own, f"{file.path}: {arch}")
    for key, value in own.items():
        if key not in _KNOWN and value not in _INERT.get(key, ()):
            if key in _INERT:
                raise meta.unsupported(key, repr(_INERT[key][0]))
            raise ConfigError(f"{file.path}: key {prefix}{key} = {value!r:.60} is not supported")
    return meta


def _read_config(file: GgufFile, meta: Fields) -> ModelConfig:
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise ConfigError(f"{file.path} has no tensor token_embd.weight")
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    num_layers = meta.integer("block_count")
    if num_layers > len(file.tensors):  # before anybody lists the tensors that they would have
        raise meta.unsupported("block_count", f"at most {len(file.tensors)} (the tensors)")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            raise meta.unsupported(key, f"{head_dim} (the whole head)")
    theta = _shortest(meta.number("rope.freq_base", 10000.0))
    first = {name.removeprefix("blk.0.") for name in file.tensors if name.startswith("blk.0.")}
    return ModelConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=meta.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=meta.integer("context_length"),
        rms_norm_eps=_shortest(meta.number("attention.layer_norm_rms_epsilon", None)),
        rope_theta=theta,
        rope_scaling=read_rope(meta, theta, head_dim, file.tensors.get("rope_freqs.weight")),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="attn_q.bias" in first,
        o_bias="attn_output.bias" in first,
        mlp_bias="ffn_down.bias" in first,
        qk_norm="attn_q_norm.weight" in first and meta.where.endswith("qwen3"),
        sliding_window=meta.optional_integer("attention.sliding_window"),
    )


def _shortest(value: float) -> float:
    """The file holds float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
