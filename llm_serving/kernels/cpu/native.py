"""Is the extension module of the CPU kernels there, and can this processor run it?

Nothing here imports torch: the front end asks, and preparation packs weights with it.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from llm_serving.errors import ConfigError

__all__ = ["INSTRUCTION_SET", "instruction_set", "native", "why_not"]

INSTRUCTION_SET = "LLM_SERVING_INSTRUCTION_SET"  # in the environment, which agents inherit

_module: ModuleType | None = None
_reason = ""
try:
    _module = importlib.import_module("llm_serving.kernels.cpu._native")
except ImportError as exc:
    _reason = f"the extension module was not built ({exc})"
else:
    if not _module.supported():
        _reason = "the processor lacks AVX2, FMA or F16C"


def why_not() -> str:
    """Why the native kernels cannot run here; empty if they can."""
    if os.environ.get(INSTRUCTION_SET) == "none":
        return f"{INSTRUCTION_SET} is none"
    return _reason


def native() -> Any:
    """The extension module.  Raises ConfigError where it cannot run."""
    if reason := why_not():
        raise ConfigError(f"the native kernels cannot run here: {reason}")
    return _module


def instruction_set() -> str:
    """The one that the environment asks for, else "auto"; "none" switches the kernels off.

    Raises ConfigError for one that this processor or this build lacks.  Without the module nobody
    knows which there are, and any is returned.
    """
    wanted = os.environ.get(INSTRUCTION_SET) or "auto"
    if _module is not None:
        known = ["auto", "none", *_module.supported(), *_module.on_request()]
        if wanted not in known:
            there = ", ".join(known)
            sentence = f"expected one of {there} here, found {wanted!r:.60}"
            raise ConfigError(f"{INSTRUCTION_SET}: {sentence}")
    return wanted
