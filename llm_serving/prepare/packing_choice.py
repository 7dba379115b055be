"""In which form the native kernels shall find a model's weights, and whether they can run it.

Their limits are those of csrc/bind_plan.cpp and csrc/bind_pack.cpp.  The front end asks, too: a
model may have been prepared for the reference kernels before somebody insists on the native ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from llm_serving.errors import ConfigError
from llm_serving.model_card import Dtype, ModelConfig, Weights
from llm_serving.prepare.progress import Progress

__all__ = ["Packing", "choose_packing", "misfit_error", "why_misfit"]

_MAX_HEAD_DIM = 1024
_HALF_PANEL = 16  # rows of gates, then of up-projections, that stand side by side
_MAX_INT8_INPUTS = 65536  # sums in int32


@dataclass(frozen=True, slots=True)
class Packing:
    weights: Weights
    dtype: Dtype  # of the KV cache


def choose_packing(
    weights: str | None,
    dtype: str,
    needs_native: bool,
    kind: str,
    config: ModelConfig,
    progress: Progress,
) -> Packing | None:
    """How to pack a model whose file has numbers of `kind`; None: it is not for the native kernels.

    `dtype` float32 alone means float32 throughout; otherwise the file's own weights are kept.
    Raises ConfigError for what was asked for, these kernels or such weights, and cannot be.
    """
    if weights is None:
        return None
    if problem := why_misfit(config, weights):
        if needs_native or weights != "auto":
            raise misfit_error(problem, weights)
        progress.say(f"the native kernels cannot run this model: {problem}; it runs on reference")
        return None
    is_plain = kind.lower() in ("f32", "f16", "bf16", "float32", "float16", "bfloat16")
    is_float32 = kind.lower() in ("f32", "float32")
    cache: Dtype = (
        "float32" if dtype == "float32" or (dtype == "auto" and is_float32) else "bfloat16"
    )
    for known in get_args(Weights):
        if weights == known:
            return Packing(known, cache)
    if cache == "float32":
        return Packing("float32", cache)
    return Packing("bfloat16" if is_plain else "native", cache)


def why_misfit(config: ModelConfig, weights: str) -> str:
    """What the native kernels, with such weights, cannot run of a model; empty if they can."""
    if config.head_dim > _MAX_HEAD_DIM:
        return f"its head_dim is {config.head_dim}, more than {_MAX_HEAD_DIM}"
    if config.head_dim % 2:
        return f"its head_dim is {config.head_dim}, an odd number"
    if config.intermediate_size % _HALF_PANEL:
        return (
            f"its intermediate_size is {config.intermediate_size}, not a multiple of {_HALF_PANEL}"
        )
    inputs = {
        "hidden_size": config.hidden_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    widest = max(inputs, key=lambda name: inputs[name])
    if weights == "int8" and inputs[widest] > _MAX_INT8_INPUTS:
        return f"its {widest} is {inputs[widest]}, more than {_MAX_INT8_INPUTS}"
    return ""


def misfit_error(problem: str, weights: str) -> ConfigError:
    """For who asked for the native kernels, or for `weights` that only they have."""
    asked = "kernels native" if weights == "auto" else f"weights {weights}"
    return ConfigError(
        f"{asked}: the native kernels cannot run this model: {problem}; with kernels auto and "
        "weights auto it is served all the same"
    )
