"""What does a config.json say, in our words?

Only what the reference implementation of the four architectures reads is read here; whatever
would make it compute something else than our model is refused with the field's name and value.
"""

from __future__ import annotations

import msgspec

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig
from llm_serving.prepare.hf_fields import refuse_other_mathematics
from llm_serving.prepare.hf_rope import read_rope
from llm_serving.prepare.json_file import Fields

__all__ = ["read_architecture", "read_model_config"]


class _Family(msgspec.Struct, frozen=True):
    """What the reference assumes where config.json is silent."""

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    always_qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048),
    "MistralForCausalLM": _Family("mistral", 131072, 8, sliding_window=4096),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, always_qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", 32768, 32, 128, qk_norm=True),
}


def read_architecture(config: Fields) -> str:
    """The one architecture config.json names, by class or else by model_type."""
    named = config.values.get("architectures")
    if named is None:
        for architecture, family in _FAMILIES.items():
            if config.values.get("model_type") == family.model_type:
                return architecture
        raise config.unsupported("model_type", ", ".join(f.model_type for f in _FAMILIES.values()))
    if not isinstance(named, list) or len(named) != 1 or named[0] not in _FAMILIES:
        raise config.unsupported("architectures", "one of " + ", ".join(_FAMILIES))
    return str(named[0])


def read_model_config(config: Fields, architecture: str) -> ModelConfig:
    """The hyperparameters; ConfigError names the field that is missing or not supported."""
    family = _FAMILIES[architecture]
    refuse_other_mathematics(config, qk_norm=family.qk_norm)
    layer_types = config.values.get("layer_types") or []
    if not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}:
        raise config.unsupported("layer_types", "full_attention in every layer")
    longest = config.integer("max_position_embeddings", family.max_position_embeddings)
    theta, scaling = read_rope(config, longest)
    hidden, heads, head_dim, kv_heads = _sizes(config, family)
    bias = family.model_type in ("llama", "qwen3") and config.flag("attention_bias", False)
    return ModelConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=family.always_qkv_bias or bias,
        o_bias=bias,
        mlp_bias=family.model_type == "llama" and config.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(config, family),
    )


def _sizes(config: Fields, family: _Family) -> tuple[int, int, int, int]:
    """(hidden_size, num_attention_heads, head_dim, num_key_value_heads), consistent."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    assumed = family.num_key_value_heads
    if "num_key_value_heads" in config.values or assumed is None:
        assumed = heads  # null means: as many as query heads
    kv_heads = config.integer("num_key_value_heads", assumed)
    if heads % kv_heads:
        raise config.unsupported("num_key_value_heads", f"a divisor of {heads} query heads")
    assumed_dim = family.head_dim
    if assumed_dim is None:
        if hidden % heads and config.values.get("head_dim") is None:
            raise config.unsupported("hidden_size", f"a multiple of {heads} heads")
        assumed_dim = hidden // heads
    head_dim = config.integer("head_dim", assumed_dim)
    if head_dim % 2:
        raise ConfigError(f"{config.where}: head_dim = {head_dim} is not even")
    return hidden, heads, head_dim, kv_heads


def _sliding_window(config: Fields, family: _Family) -> int | None:
    """Mistral's window, in every layer; missing is the reference's default, null is none."""
    if family.sliding_window is None:
        return None  # the other families have it behind use_sliding_window
    if "sliding_window" in config.values and config.values["sliding_window"] is None:
        return None
    return config.integer("sliding_window", family.sliding_window)
