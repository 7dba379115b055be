"""Is the head that lies in a checkpoint beside tied embeddings really their copy?

The model has one matrix for both, and the file may hold it twice; if the two differ, nobody can
tell which one was meant.  The numbers are compared, not the bytes: the copy may have another dtype.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_serving.errors import ConfigError
from llm_serving.prepare.dtypes import FLOATS, widen
from llm_serving.prepare.safetensors_file import Header

__all__ = ["check_tied_head"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PIECE = 1 << 20  # elements compared at once

Floats = np.ndarray[Any, np.dtype[np.float32]]


def check_tied_head(headers: Mapping[pathlib.Path, Header]) -> None:
    """ConfigError if a shard holds a head that differs from the embeddings, which must be there.

    Both have the same shape and one of the dtypes that are served.
    """
    holders = {name: path for path, header in headers.items() for name in header.tensors}
    if _HEAD not in holders:
        return
    pairs = (_pieces(holders[name], headers[holders[name]], name) for name in (_EMBEDDING, _HEAD))
    if not all(np.array_equal(*pair) for pair in zip(*pairs, strict=True)):
        raise ConfigError(
            f"{holders[_HEAD]}: tensor {_HEAD} differs from {_EMBEDDING}, though config.json makes "
            "them one by tie_word_embeddings"
        )


def _pieces(path: pathlib.Path, header: Header, name: str) -> Iterator[Floats]:
    """The tensor's numbers in their order, `_PIECE` at a time."""
    info = header.tensors[name]
    width = FLOATS[info.dtype].itemsize
    left = math.prod(info.shape)
    with path.open("rb") as file:
        file.seek(header.data_start + info.data_offsets[0])
        while left:
            count = min(left, _PIECE)
            yield widen(file.read(count * width), info.dtype)
            left -= count
