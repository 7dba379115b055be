"""Which kernels will run the model, decided before it is prepared: the weights depend on it."""

from __future__ import annotations

import pathlib

from llm_serving.config import ServingConfig, load_config
from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.layout import TILE
from llm_serving.kernels.cpu.native import INSTRUCTION_SET, instruction_set, why_not

__all__ = ["packed_as_served", "packed_weights"]

_GPU = pathlib.Path("/dev/nvidiactl")


def packed_weights(config: ServingConfig) -> tuple[str | None, str]:
    """(`weights` of `prepare`, why the native kernels do not run).

    Raises ConfigError if they, what only they have, or an instruction set, were asked for and
    cannot run.  With `agent.kernels` reference an instruction set is asked for by nobody, but must
    exist.
    """
    model, agent = config.model, config.agent
    wanted = instruction_set()
    reason = _why_not_native(config)
    if not reason:
        return model.weights, ""
    if agent.kernels == "native":
        raise ConfigError(f"agent.kernels: native cannot run: {reason}")
    if config.kv_cache.dtype != "auto":
        raise ConfigError(
            f"kv_cache.dtype: {config.kv_cache.dtype} needs the native kernels, but {reason}"
        )
    if model.weights != "auto":
        raise ConfigError(f"model.weights: {model.weights} needs the native kernels, but {reason}")
    if wanted not in ("auto", "none") and agent.kernels != "reference":
        raise ConfigError(f"{INSTRUCTION_SET}: {wanted} needs the native kernels, but {reason}")
    return None, reason


def packed_as_served(dtype: str, weights: str, kernels: str, device: str = "auto") -> str | None:
    """What `serve` with these flags would have the model packed as."""
    given = {
        "model.dtype": dtype,
        "model.weights": weights,
        "agent.kernels": kernels,
        "agent.device": device,
    }
    return packed_weights(load_config(None, given))[0]


def _why_not_native(config: ServingConfig) -> str:
    if config.agent.kernels == "reference":
        return "agent.kernels is reference"
    if config.agent.device.startswith("cuda") or (config.agent.device == "auto" and _GPU.exists()):
        return "the device is a GPU"
    if config.model.dtype == "float16":
        return "they have no float16"
    if config.kv_cache.block_size % TILE:
        return f"kv_cache.block_size is {config.kv_cache.block_size}, not a multiple of {TILE}"
    return why_not()
