"""LLaMA (Touvron et al. 2023) over a paged cache, and its near relatives by flags of the config.

Mistral is the same; Qwen2 has a bias on queries, keys and values; Qwen3 norms each query and key
head.  Tokens of all rows stand flat, [tokens, hidden]; which token attends to what is the step's
metadata.  `hidden` between calls is always the whole residual stream, so a model may be run in
pieces: embed, run_layers [0, k), run_layers [k, n), logits.

It does not know: requests, where weights come from, whether gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_serving.kernels.interface import Kernels
from llm_serving.model_card import ModelConfig
from llm_serving.models.layers import (
    Embedding,
    LayerPlan,
    LinearFactory,
    LinearPart,
    PlainEmbedding,
    RmsNorm,
    StepContext,
)

__all__ = ["LlamaModel"]


class LlamaModel:
    def __init__(
        self,
        config: ModelConfig,
        linears: LinearFactory,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        embedding: Embedding | None = None,
    ) -> None:
        """Memory for the weights, not filled: see `tensors`."""
        parts = _Parts(config, linears, kernels, dtype, device)
        self.embedding = embedding or PlainEmbedding(config, dtype, device)
        self.layers = [_Layer(parts, i) for i in range(config.num_hidden_layers)]
        self.plan: LayerPlan | None = None  # of the layers that a backend carries out by itself
        self.norm = parts.norm("model.norm", config.hidden_size)
        tied_to = self.embedding.weight if config.tie_word_embeddings else None
        head = LinearPart("lm_head", config.vocab_size, tied_to=tied_to)
        self.head = linears("lm_head", config.hidden_size, config.vocab_size, (head,))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> the residual stream [tokens, hidden]."""
        return self.embedding(ids)

    def run_layers(
        self, hidden: torch.Tensor, step: StepContext, start: int, stop: int
    ) -> torch.Tensor:
        """The residual stream after layers [start, stop); their keys and values are stored."""
        while start < stop:
            planned = 0 if self.plan is None else self.plan.covers(start, stop)
            if self.plan is not None and planned:
                hidden = self.plan.run(hidden, step, start, start + planned)
                start += planned
            else:
                hidden = self.layers[start](hidden, step)
                start += 1
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of these rows of the residual stream after the last layer, float32 [rows, vocab]."""
        if self.plan is not None and self.plan.has_head:
            return self.plan.logits(hidden)
        return self.head(self.norm(hidden)).float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the memory to fill; a tied head has none of its own."""
        found = self.embedding.tensors()
        for layer in self.layers:
            found |= layer.tensors()
        return found | self.norm.tensors() | self.head.tensors()


class _Parts:
    """What the constructors of the layers have in common."""

    def __init__(
        self,
        config: ModelConfig,
        linears: LinearFactory,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.linears, self.kernels = config, linears, kernels
        self._dtype, self._device = dtype, device

    def norm(self, name: str, size: int) -> RmsNorm:
        eps = self.config.rms_norm_eps
        return RmsNorm(name, size, eps, self.kernels, self._dtype, self._device)


class _Layer:
    def __init__(self, parts: _Parts, index: int) -> None:
        name, size = f"model.layers.{index}", parts.config.hidden_size
        self.input_norm = parts.norm(f"{name}.input_layernorm", size)
        self.attention = _Attention(parts, f"{name}.self_attn", index)
        self.post_attention_norm = parts.norm(f"{name}.post_attention_layernorm", size)
        self.mlp = _Mlp(parts, f"{name}.mlp")

    def __call__(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        attended = self.attention(self.input_norm(hidden), step)
        hidden, normed = self.post_attention_norm.after_add(attended, hidden)
        return hidden + self.mlp(normed)

    def tensors(self) -> dict[str, torch.Tensor]:
        norms = self.input_norm.tensors() | self.post_attention_norm.tensors()
        return norms | self.attention.tensors() | self.mlp.tensors()


class _Attention:
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, parts: _Parts, name: str, layer: int) -> None:
        config = parts.config
        dim, heads = config.head_dim, config.num_attention_heads
        kv_heads = config.num_key_value_heads
        sizes = (("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim))
        qkv = [LinearPart(f"{name}.{part}", size, config.qkv_bias) for part, size in sizes]
        self.qkv = parts.linears(
            f"{name}.qkv_proj", config.hidden_size, (heads + 2 * kv_heads) * dim, qkv
        )
        out = LinearPart(f"{name}.o_proj", config.hidden_size, config.o_bias)
        self.out = parts.linears(out.name, heads * dim, config.hidden_size, (out,))
        self.head_norms: Sequence[RmsNorm] = ()
        if config.qk_norm:
            self.head_norms = [parts.norm(f"{name}.{part}_norm", dim) for part in ("q", "k")]
        self._heads, self._kv_heads, self._dim, self._layer = heads, kv_heads, dim, layer

    def __call__(self, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        qkv = self.qkv(x).view(len(x), -1, self._dim)
        query_key, value = qkv[:, : -self._kv_heads], qkv[:, -self._kv_heads :]
        if self.head_norms:
            query_key = self._norm_heads(query_key)
        query = step.rotate_and_store(self._layer, query_key, value)
        return self.out(step.attend(self._layer, query))

    def _norm_heads(self, query_key: torch.Tensor) -> torch.Tensor:
        query, key = query_key[:, : self._heads], query_key[:, self._heads :]
        query_norm, key_norm = self.head_norms
        return torch.cat((query_norm(query), key_norm(key)), 1)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = self.qkv.tensors() | self.out.tensors()
        for norm in self.head_norms:
            found |= norm.tensors()
        return found


class _Mlp:
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, parts: _Parts, name: str) -> None:
        config = parts.config
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        gate_up = [LinearPart(f"{name}.{part}_proj", inner, bias) for part in ("gate", "up")]
        self.gate_up = parts.linears(f"{name}.gate_up_proj", size, 2 * inner, gate_up)
        down = LinearPart(f"{name}.down_proj", size, bias)
        self.down = parts.linears(down.name, inner, size, (down,))
        self._silu_and_mul = parts.kernels.silu_and_mul

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self._silu_and_mul(self.gate_up(x)))

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.gate_up.tensors() | self.down.tensors()
