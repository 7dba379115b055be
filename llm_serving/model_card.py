"""What is known of a model that is ready to be served: the words of preparation to everybody else.

`prepare` writes a card beside what it converted; the front end reads the tokenizer and the ids
from it, the agent the hyperparameters and the weight files.  Neither opens the original again.
"""

from __future__ import annotations

import pathlib
from typing import Literal

import msgspec

__all__ = [
    "CARD_VERSION",
    "DERIVED_TENSORS",
    "Dtype",
    "ModelCard",
    "ModelConfig",
    "RopeScaling",
    "Weights",
    "served_as",
]

CARD_VERSION = 2  # raised when what is cached changes its meaning

# How the names of tensors end that old checkpoints carry though they follow from the configuration
DERIVED_TENSORS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")

Dtype = Literal["float32", "bfloat16", "float16"]
Weights = Literal["float32", "bfloat16", "int8", "native"]  # how packed linear layers are stored


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hugging Face's `rope_scaling` (5.x: `rope_parameters`), under its names."""

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hyperparameters of a LLaMA-family model, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # LLaMA's attention_bias is qkv_bias and o_bias; Qwen2 has the former
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: rms norm over head_dim of every query and key head
    sliding_window: int | None = None  # served only up to this context, where it changes nothing

    @property
    def longest_context(self) -> int:
        """Tokens up to which rotary positions mean something.

        `default` and `llama3` state it; the others stretch the length that was trained, and some
        checkpoints state that, some the stretched one.
        """
        scaling, stated = self.rope_scaling, self.max_position_embeddings
        if scaling.rope_type in ("default", "llama3"):
            return stated
        trained = scaling.original_max_position_embeddings or stated
        return max(stated, int(scaling.factor * trained))


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    name: str  # for people: "SmolLM2-135M-Instruct.Q4_1"
    source: str  # the file or folder it was made from
    architecture: str  # "LlamaForCausalLM"
    config: ModelConfig
    dtype: Dtype  # what the agent computes in
    weights: list[str]  # safetensors files, absolute; Hugging Face tensor names, any float dtype
    weights_kind: str  # what the original held: "Q4_1", "bfloat16"
    tokenizer: str  # a tokenizer.json whose own post-processor adds BOS, or does not
    digest: str  # names weights and tokenizer: same digest, same model
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []
    chat_template: str | None = None
    packed: str | None = None  # instead: a file for the native kernels, in the form `packed_as`
    packed_as: Weights | None = None

    @property
    def key(self) -> str:
        """Its place among the prepared models of this machine."""
        return pathlib.Path(self.tokenizer).parent.name

    @property
    def weights_served(self) -> str:
        """What the linear layers multiply with: "Q4_1", or "Q4_1 as int8"."""
        if self.packed_as in (None, "native", self.weights_kind):
            return self.weights_kind
        return f"{self.weights_kind} as {self.packed_as}"


def served_as(card: ModelCard, kv_dtype: str = "auto") -> str:
    """For people: what the file holds, and what becomes of it."""
    if card.packed_as is None:
        return f"{card.weights_kind} weights served in {card.dtype}"
    cache = f"{card.dtype if kv_dtype == 'auto' else kv_dtype} cache"
    if card.packed_as == "native":
        return f"{card.weights_kind} weights as they are, {cache}"
    return f"{card.weights_kind} weights packed as {card.packed_as}, {cache}"
