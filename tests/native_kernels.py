"""Tests of the native kernels: where these cannot run, they are skipped and the reason is told."""

from __future__ import annotations

from typing import Any

import pytest

from llm_serving.kernels.cpu.native import native, why_not

__all__ = ["native_or_skip", "needs_native"]

_SENTENCE = f"the native kernels cannot run: {why_not()}"

needs_native = pytest.mark.skipif(bool(why_not()), reason=_SENTENCE)


def native_or_skip() -> Any:
    """The extension module, else the test module that is being imported is skipped."""
    if why_not():
        pytest.skip(_SENTENCE, allow_module_level=True)
    return native()
