"""Tiny random models in the reference library, and the same weights in ours.

`build_twin` makes a model of transformers with random weights, saves it, and describes it by a
card.  `PagedRunner` runs ours over a cache that is full of NaN, its blocks in scrambled order.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from llm_serving.agent.kv_cache import KvCache
from llm_serving.kernels.reference import ReferenceKernels
from llm_serving.model_card import CARD_VERSION, Dtype, ModelCard, ModelConfig, RopeScaling
from llm_serving.models.attention_metadata import AttentionMetadata, MetadataBuilder
from llm_serving.models.checkpoint import load_weights
from llm_serving.models.layers import LinearFactory, PlainLinears
from llm_serving.models.llama import LlamaModel
from llm_serving.models.rope import rotary_table
from tests.tiny_tokenizer import tiny_tokenizer_path

VOCAB_SIZE = 97
CONTEXT = 128
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class Twin:
    reference: Any  # a transformers model
    card: ModelCard

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The reference's, of every position, float32 [len(ids), vocab]."""
        with torch.no_grad():
            logits: torch.Tensor = self.reference(torch.tensor([list(ids)])).logits[0]
        return logits.float()

    def generate(self, prompt: Sequence[int], num_new: int) -> list[int]:
        """The reference's greedy continuation, computed without a cache."""
        ids = list(prompt)
        for _ in range(num_new):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def build_twin(
    folder: pathlib.Path,
    family: str = "llama",
    *,
    dtype: Dtype = "float32",
    shard_size: str = "1GB",
    seed: int = 0,
    **settings: Any,
) -> Twin:
    """`settings` are transformers' own, on top of SMALL; weights spread so that logits differ."""
    config_type, model_type = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_type(**{**SMALL, **settings})
    model = model_type(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            weight.normal_(around, 0.15)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return Twin(model, make_card(folder, model_config(family, config), dtype))


def save_misfit(folder: pathlib.Path) -> pathlib.Path:
    """A model that the native kernels cannot run, with its tokenizer, as a checkpoint's folder."""
    build_twin(folder, intermediate_size=40)
    tiny_tokenizer_path(folder)
    return folder


def make_card(folder: pathlib.Path, config: ModelConfig, dtype: Dtype = "float32") -> ModelCard:
    return ModelCard(
        version=CARD_VERSION,
        name=folder.name,
        source=str(folder),
        architecture="LlamaForCausalLM",
        config=config,
        dtype=dtype,
        weights=sorted(str(path) for path in folder.glob("*.safetensors")),
        weights_kind="float32",
        tokenizer="",
        digest="",
    )


def model_config(family: str, config: Any) -> ModelConfig:
    """The hyperparameters of a transformers config in our words."""
    scaling = dict(config.rope_parameters)
    theta = scaling.pop("rope_theta")
    attention_bias = bool(getattr(config, "attention_bias", False))
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=RopeScaling(**scaling),
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def load_model(
    card: ModelCard, linears: LinearFactory | None = None, dtype: torch.dtype | None = None
) -> LlamaModel:
    dtype = dtype or DTYPES[card.dtype]
    kernels = ReferenceKernels()
    model = LlamaModel(
        card.config, linears or PlainLinears(kernels, dtype, CPU), kernels, dtype, CPU
    )
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    load_weights(
        card.weights, model.tensors(), tied=tied if card.config.tie_word_embeddings else {}
    )
    return model


@dataclass(frozen=True)
class Chunk:
    """One row of a step: tokens to compute, from place `start` of the sequence in `blocks`."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]


class PagedRunner:
    def __init__(
        self,
        card: ModelCard,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = CONTEXT,
        model: LlamaModel | None = None,
        seed: int = 0,
    ) -> None:
        dtype = DTYPES[card.dtype]
        self.model = model or load_model(card)
        self.num_layers = card.config.num_hidden_layers
        self.block_size = block_size
        self.cache = KvCache(card.config, num_blocks, block_size, dtype, CPU)
        self.cache.tensor.fill_(torch.nan)
        table = rotary_table(card.config, max_model_len, CPU)
        self._builder = MetadataBuilder(
            ReferenceKernels(), table, self.cache.layers, block_size, dtype
        )
        self._free = list(np.random.default_rng(seed).permutation(num_blocks))

    def take_blocks(self, num_tokens: int) -> list[int]:
        return [int(self._free.pop()) for _ in range(-(-num_tokens // self.block_size))]

    def metadata(self, chunks: Sequence[Chunk]) -> AttentionMetadata:
        starts = np.cumsum([0] + [len(chunk.ids) for chunk in chunks]).astype(np.int32)
        contexts = np.array([chunk.start + len(chunk.ids) for chunk in chunks], np.int32)
        width = max(len(chunk.blocks) for chunk in chunks)
        tables = np.full((len(chunks), width), -1, np.int32)
        for table, chunk in zip(tables, chunks, strict=True):
            table[: len(chunk.blocks)] = chunk.blocks
        positions = np.concatenate(
            [np.arange(c.start, c.start + len(c.ids), dtype=np.int32) for c in chunks]
        )
        row_of = np.repeat(np.arange(len(chunks)), np.diff(starts))
        slots = tables[row_of, positions // self.block_size] * self.block_size
        slots = (slots + positions % self.block_size).astype(np.int32)
        return self._builder.build(positions, slots, starts, contexts, tables)

    def step(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Logits of every token of every row, float32 [len(ids), vocab] each."""
        ids = torch.tensor([token for chunk in chunks for token in chunk.ids])
        with torch.inference_mode():
            metadata = self.metadata(chunks)
            hidden = self.model.run_layers(self.model.embed(ids), metadata, 0, self.num_layers)
            logits = self.model.logits(hidden)
        return list(torch.split(logits, [len(chunk.ids) for chunk in chunks]))
