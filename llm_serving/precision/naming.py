"""How are the files with logits called, and what names a prefix of tokens?

    <time>_<key>_<position>.npy      1722435014.2383034_1.07523.0278.01494.0_100.npy

    time       seconds of the Unix clock, seven digits behind the point, unique in the folder
    key        the first 20 characters of the token ids, each written as a float: "1.0" "7523.0" ...
    position   index of the last token seen, in prompt and output together

A key is short and so not unique; the digest is drawn over every id up to the position.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["KEY_LENGTH", "file_name", "key_of", "prefix_digest", "time_of"]

KEY_LENGTH = 20


def file_name(time_s: float, key: str, position: int) -> str:
    return f"{time_s:.7f}_{key}_{position}.npy"


def time_of(name: str) -> float:
    """What stands before the first underscore; 0 if that is no number."""
    try:
        return float(name.partition("_")[0])
    except ValueError:
        return 0.0


def key_of(token_ids: npt.NDArray[np.int32]) -> str:
    return "".join(f"{token_id}.0" for token_id in token_ids[:KEY_LENGTH].tolist())[:KEY_LENGTH]


def prefix_digest(token_ids: npt.NDArray[np.int32]) -> str:
    """sha256 of the ids as little-endian 32-bit integers, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).hexdigest()
