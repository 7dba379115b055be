"""How this program starts itself again: as an agent, or to prepare a model."""

from __future__ import annotations

import pathlib
import sys

__all__ = ["program"]


def program() -> list[str]:
    """The argv of `llm-serving`, so that `ps` shows its name; a module if it is not installed."""
    script = pathlib.Path(sys.executable).with_name("llm-serving")
    return (
        [sys.executable, str(script)] if script.exists() else [sys.executable, "-m", "llm_serving"]
    )
