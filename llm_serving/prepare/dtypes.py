"""In which dtype is a model served, and how do float32 numbers become it, and come back?

numpy has no bfloat16: it is made of bits here.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from llm_serving.errors import ConfigError
from llm_serving.model_card import Dtype

__all__ = ["CONTAINER_NAMES", "DTYPES", "FLOATS", "cast", "cpu_has_bfloat16", "widen"]

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
CONTAINER_NAMES: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# How the bytes of each container dtype are read
FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
}


def cpu_has_bfloat16(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> bool:
    """Does this processor multiply bfloat16 in hardware?  Unknown counts as no."""
    try:
        with cpuinfo.open() as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def cast(values: np.ndarray[Any, np.dtype[np.float32]], dtype: Dtype, name: str) -> memoryview:
    """The bytes of `values` as `dtype`, rounded to nearest even.

    Raises ConfigError, naming the tensor, for a finite value that float16 can not hold.
    """
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        quiet = np.where(np.isnan(values), (bits >> 16) | 64, rounded)  # NaN must stay one
        return quiet.astype(np.uint16).data.cast("B")
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(np.isinf(halves), np.isinf(values)):
            raise ConfigError(f"tensor {name} holds values beyond float16; use bfloat16 or float32")
        return halves.data.cast("B")
    return np.ascontiguousarray(values).data.cast("B")


def widen(raw: bytes, container: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The numbers in `raw`, of a container dtype of `FLOATS`, exactly."""
    values = np.frombuffer(raw, FLOATS[container])
    if container == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, np.float32)
