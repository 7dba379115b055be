"""What rows of logits amount to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SUMMARY_DTYPE", "Digest"]

# What a range of 2,048 logits of a row amounts to: the largest (not finite if any is not), its
# lowest id, the sum of e^(logit - largest), and of e^((logit - largest) / temperature) for a draw.
SUMMARY_DTYPE = np.dtype(
    [("max", np.float32), ("arg_max", np.int32), ("sum", np.float32), ("heated", np.float32)]
)


@dataclass(frozen=True, slots=True)
class Digest:
    """What rows of logits amount to, so that nobody need read all of them to sample.

    ranges: [num_rows, ranges of 2,048 logits] SUMMARY_DTYPE
    maxima: float32 [num_rows, .] the largest of every eight logits, if the logits were kept
    """

    ranges: npt.NDArray[Any]
    maxima: npt.NDArray[np.float32] | None

    @staticmethod
    def empty(module: Any, num_rows: int, vocab_size: int, has_maxima: bool) -> Digest:
        ranges = np.empty((num_rows, module.num_ranges(vocab_size)), SUMMARY_DTYPE)
        shape = (num_rows, module.num_maxima(vocab_size))
        return Digest(ranges, np.empty(shape, np.float32) if has_maxima else None)

    def columns(self) -> npt.NDArray[np.float32]:
        """`ranges` as the extension module takes them, float32 [num_rows, ranges, 4]."""
        return self.ranges.view(np.float32).reshape(*self.ranges.shape, SUMMARY_DTYPE.itemsize // 4)
