"""Is the extension module of the CPU kernels there, and can this processor run it?

Nothing here imports torch: the front end asks, and preparation packs weights with it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__all__ = ["native", "why_not"]

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
    return _reason


def native() -> Any:
    """The extension module.  Ask `why_not` first."""
    if _module is None:
        raise ImportError(_reason)
    return _module
