"""Which tensors does a model of the LLaMA family have, and of which shapes?

One table, under Hugging Face's names, that a checkpoint is checked against before anybody waits
for it to load, and that a GGUF file is converted by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_serving.errors import ConfigError
from llm_serving.model_card import DERIVED_TENSORS, ModelConfig

__all__ = ["check_tensors", "expected_tensors"]

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape ([out, in] for matrices) of every tensor, in the order of the forward pass."""
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size)
    }
    for layer in range(config.num_hidden_layers):
        inner = _layer_tensors(config)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": ((queries, hidden), config.qkv_bias),
        "self_attn.k_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.v_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, queries), config.o_bias),
        "mlp.gate_proj": ((inner, hidden), config.mlp_bias),
        "mlp.up_proj": ((inner, hidden), config.mlp_bias),
        "mlp.down_proj": ((hidden, inner), config.mlp_bias),
    }
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (shape, has_bias) in linears.items():
        shapes[f"{name}.weight"] = shape
        if has_bias:
            shapes[f"{name}.bias"] = shape[:1]
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def check_tensors(
    found: Mapping[str, Sequence[int]], config: ModelConfig, where: str, architecture: str
) -> None:
    """Raise ConfigError, naming the tensor, unless `found` (name -> shape) is the whole model."""
    if config.num_hidden_layers > len(found):  # before anybody lists what they would have
        raise ConfigError(
            f"{where}: num_hidden_layers = {config.num_hidden_layers}, but there are only "
            f"{len(found)} tensors"
        )
    expected = expected_tensors(config)
    if config.tie_word_embeddings and "lm_head.weight" in found:  # a copy; see tied_head
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{where} has no tensor {name}, which {architecture} needs")
        if tuple(found[name]) != shape:
            raise ConfigError(
                f"{where}: tensor {name} has shape {list(found[name])}, the configuration asks "
                f"for {list(shape)}"
            )
    for name in found:
        if name not in expected and not name.endswith(DERIVED_TENSORS):
            raise ConfigError(f"{where}: tensor {name} has no place in {architecture}")
