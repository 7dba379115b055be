"""Which backend carries out the operations on a device.

Today the reference does all of them everywhere.  A native CPU and a Triton backend subclass it,
override what they do better, and are chosen here.
"""

from __future__ import annotations

import torch

from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.interface import Kernels
from llm_serving.kernels.reference import ReferenceKernels

__all__ = ["select_device", "select_kernels"]


def select_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is a GPU if there is one.

    Raises ConfigError for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device: expected auto, cpu or cuda, found {name!r}") from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} is not there; torch sees {torch.cuda.device_count()}")
    return device


def select_kernels(device: torch.device, native_threads: int | None = None) -> Kernels:
    """`native_threads`: the threads of the native CPU kernels, if the model is packed for them."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: no kernels for {device.type}")
    if native_threads is not None:
        if device.type != "cpu":
            raise ConfigError(f"device: the weights are packed for the CPU, not for {device.type}")
        return NativeKernels(native_threads)
    return ReferenceKernels()
