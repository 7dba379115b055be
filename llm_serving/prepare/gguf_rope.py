"""Which rotary scaling does a GGUF file ask for?

Linear and yarn scaling stand in the metadata.  Llama 3's is a tensor of one divisor per frequency,
`rope_freqs.weight`, out of which the converter's four numbers are found again, or the file is
refused: nothing else in the house knows free divisors.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from llm_serving.errors import ConfigError
from llm_serving.model_card import RopeScaling
from llm_serving.prepare.gguf_file import GgufTensor
from llm_serving.prepare.json_file import Fields

__all__ = ["llama3_divisors", "read_rope"]

Floats = np.ndarray[Any, np.dtype[np.float64]]

_ORIGINAL_LENGTHS = [8192, 4096, 2048, 16384, 32768, 65536, 131072]


def read_rope(
    meta: Fields, theta: float, head_dim: int, divisors: GgufTensor | None
) -> RopeScaling:
    """`meta` holds the keys of the architecture without their prefix."""
    kind = meta.values.get("rope.scaling.type", "none")
    scaled = "rope.scale_linear" if "rope.scale_linear" in meta.values else "rope.scaling.factor"
    factor = meta.number(scaled, 1.0)
    if kind == "none" and scaled == "rope.scale_linear" and factor != 1:
        kind = "linear"
    if divisors is not None:
        if kind != "none":
            raise meta.unsupported("rope.scaling.type", "none beside rope_freqs.weight")
        return _llama3(divisors, theta, head_dim, meta.where)
    if kind == "none" or (kind == "linear" and factor == 1):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise meta.unsupported("rope.scaling.type", "none, linear, yarn")
    return _yarn(meta, factor)


def _yarn(meta: Fields, factor: float) -> RopeScaling:
    """llama.cpp scales by attn_factor * (1 + 0.1 ln factor)."""
    attention = meta.number(
        "rope.scaling.yarn_attn_factor", meta.number("rope.scaling.attn_factor", 1.0)
    )
    if meta.values.get("rope.scaling.yarn_ext_factor", 1.0) not in (-1.0, 1.0):
        raise meta.unsupported("rope.scaling.yarn_ext_factor", "1")
    whole = attention * (1 + 0.1 * math.log(factor)) if attention != 1 else None
    return RopeScaling(
        "yarn",
        factor,
        meta.integer("rope.scaling.original_context_length", meta.integer("context_length")),
        beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=whole,
    )


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Floats:
    """What each frequency is divided by, [head_dim / 2]: the rule of Llama 3.1."""
    length = scaling.original_max_position_embeddings or 0
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling.factor + smooth), np.float64)


def _llama3(tensor: GgufTensor, theta: float, head_dim: int, where: str) -> RopeScaling:
    if tensor.type != gguf.GGMLQuantizationType.F32 or tensor.num_elements != head_dim // 2:
        raise ConfigError(f"{where}: tensor rope_freqs.weight is not {head_dim // 2} F32 numbers")
    given = tensor.data.reshape(-1).view(np.float32).astype(np.float64)
    if np.all(given == 1):
        return RopeScaling()
    for length in _ORIGINAL_LENGTHS:
        scaling = RopeScaling("llama3", float(given.max()), length)
        if np.allclose(llama3_divisors(scaling, theta, head_dim), given, rtol=1e-4):
            return scaling
    raise ConfigError(
        f"{where}: rope_freqs.weight is not supported: its divisors do not follow Llama 3.1's rule "
        "with low_freq_factor 1 and high_freq_factor 4"
    )
