"""Constants of the native kernels that are needed without them."""

from __future__ import annotations

__all__ = ["LAYOUT_VERSION", "TILE"]

LAYOUT_VERSION = 1  # of packed weights; raised when csrc/layout.hpp changes
TILE = 16  # tokens of the cache that stand together: block_size is a multiple
