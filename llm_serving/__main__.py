"""`python -m llm_serving` and the `llm-serving` script."""

from __future__ import annotations

import sys

from llm_serving.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
