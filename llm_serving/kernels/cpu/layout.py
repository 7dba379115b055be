"""Constants of the native kernels that are needed without them."""

from __future__ import annotations

import numpy as np

__all__ = ["LAYOUT_VERSION", "SUMMARY_DTYPE", "TILE"]

LAYOUT_VERSION = 1  # of packed weights; raised when csrc/layout.hpp changes
# What a row of logits amounts to: the largest (not finite if any is not), its lowest id, and the
# sum of e^(logit - largest).
SUMMARY_DTYPE = np.dtype([("max", np.float32), ("arg_max", np.int32), ("sum", np.float32)])
TILE = 16  # tokens of the cache that stand together: block_size is a multiple
