"""Rotary position embedding: how fast each pair of dimensions turns, and the table of turns.

Su et al. 2021, with the stretchings that checkpoints name in `rope_scaling`; each follows the
definition in transformers' modeling_rope_utils.  `dynamic` there depends on the longest sequence
seen so far, which makes a token's key depend on its company: here its factor is fixed from
max_model_len.

Dimension i turns together with i + d/2 (Hugging Face's layout of the weights), so the table holds
for each position cos and sin twice, with the first sin negated: x * cos + swap_halves(x) * sin.
"""

from __future__ import annotations

import math

import torch

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelConfig, RopeScaling

__all__ = ["inverse_frequencies", "rotary_table"]


def rotary_table(
    config: ModelConfig, max_model_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each float32 [max_model_len, head_dim], for the positions a model may see."""
    frequencies, attention_factor = inverse_frequencies(config, max_model_len)
    turns = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    cos, sin = turns.cos() * attention_factor, turns.sin() * attention_factor
    return torch.cat((cos, cos), 1).to(device), torch.cat((-sin, sin), 1).to(device)


def inverse_frequencies(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Radians a position for each pair, float32 [head_dim / 2], and what scales cos and sin."""
    scaling = config.rope_scaling
    if config.head_dim % 2:
        raise ConfigError(f"head_dim: {config.head_dim} is odd; rotary embedding turns pairs")
    match scaling.rope_type:
        case "default":
            return _plain(config.rope_theta, config.head_dim), 1.0
        case "linear":
            return _plain(config.rope_theta, config.head_dim) / scaling.factor, 1.0
        case "dynamic":
            return _plain(_dynamic_theta(config, max_model_len), config.head_dim), 1.0
        case "llama3":
            return _llama3(config), 1.0
        case "yarn":
            return _yarn(config), _yarn_attention_factor(scaling)


def _plain(theta: float, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


def _original_length(config: ModelConfig) -> int:
    return config.rope_scaling.original_max_position_embeddings or config.max_position_embeddings


def _dynamic_theta(config: ModelConfig, max_model_len: int) -> float:
    """NTK-aware: the base that stretches the slowest pair to max_model_len (bloc97, emozilla)."""
    factor, trained = config.rope_scaling.factor, config.max_position_embeddings
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    return float(config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2)))


def _llama3(config: ModelConfig) -> torch.Tensor:
    """Long waves stretched, short ones kept, those between blended (Llama 3.1)."""
    scaling, frequencies = config.rope_scaling, _plain(config.rope_theta, config.head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_in_context = _original_length(config) * frequencies / (2 * math.pi)
    share_kept = ((turns_in_context - low) / (high - low)).clamp(0, 1)
    return (1 - share_kept) * frequencies / scaling.factor + share_kept * frequencies


def _yarn(config: ModelConfig) -> torch.Tensor:
    """NTK by parts (Peng et al. 2023): a ramp over the pairs between beta_fast and beta_slow."""
    scaling, half = config.rope_scaling, config.head_dim // 2
    frequencies = _plain(config.rope_theta, config.head_dim)

    def pair_that_turns(times: float) -> float:
        length_of_turn = _original_length(config) / (times * 2 * math.pi)
        return config.head_dim * math.log(length_of_turn) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / (high - low or 0.001)
    share_kept = 1 - ramp.clamp(0, 1)
    return (1 - share_kept) * frequencies / scaling.factor + share_kept * frequencies


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def of_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return of_scale(scaling.mscale) / of_scale(scaling.mscale_all_dim)
    return of_scale(1.0)
