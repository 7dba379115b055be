"""How are the files with logits called, and what names a prefix of tokens?

    <time>_<key>_<position>.npy      1722435014.2383034_1.07523.0278.01494.0_100.npy

    time       seconds of the Unix clock, seven digits behind the point, unique in the folder
    key        the first 20 characters of the token ids, each written as a float: "1.0" "7523.0" ...
               or, by older tools, as an integer: "1" "7523" ...
    position   index of the last token seen, in prompt and output together

A key is short and so not unique; the digest is drawn over every id up to the position.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "KEY_LENGTH",
    "FileName",
    "digits_of",
    "file_name",
    "key_of",
    "keys_match",
    "keys_of",
    "prefix_digest",
    "printable",
    "read_name",
]

KEY_LENGTH = 20
_NAME = re.compile(r"(?P<time>\d+(?:\.\d+)?)_(?P<key>[\d.]+)_(?P<position>\d+)\.npy", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileName:
    time_s: float
    key: str
    position: int


def file_name(time_s: float, key: str, position: int) -> str:
    return f"{time_s:.7f}_{key}_{position}.npy"


def read_name(name: str) -> FileName | None:
    """None if it is not of this form."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    return FileName(float(found["time"]), found["key"], int(found["position"]))


def key_of(token_ids: npt.NDArray[np.int32]) -> str:
    """As the server writes it."""
    return keys_of(token_ids)[1]


def keys_of(token_ids: Sequence[int] | npt.NDArray[np.int32]) -> tuple[str, str]:
    """In both spellings: digits of integers, and of floats."""
    first = [int(i) for i in token_ids[:KEY_LENGTH]]
    whole, floats = "".join(map(str, first)), "".join(f"{i}.0" for i in first)
    return whole[:KEY_LENGTH], floats[:KEY_LENGTH]


def digits_of(key: str) -> str:
    """What a key says of the integers' digits.

    In the float spelling every point is followed by the one 0 that belongs to it, then by the next
    id: "10.07.0" is 10 and 7, never 1 and 07.  So dropping each ".0" from the left leaves the
    digits of the ids.  A key that was cut may end in ".", which is dropped, too, or inside an id,
    whose digits so far are kept: what is left is always a beginning of the integers' digits.
    """
    return key.replace(".0", "").removesuffix(".")


def keys_match(one: str, other: str) -> bool:
    """Can both be the key of the same ids?

    Equal spellings are cut alike, so only equal keys match.  A float key shows fewer digits than an
    integer key of the same length: its digits must begin the integer's, and be all of them if it
    was so short that nothing was cut.
    """
    if ("." in one) == ("." in other):
        return one == other
    floats, whole = (one, other) if "." in one else (other, one)
    if len(floats) < KEY_LENGTH:
        return digits_of(floats) == whole
    return whole.startswith(digits_of(floats))


def prefix_digest(token_ids: npt.NDArray[np.int32]) -> str:
    """sha256 of the ids as little-endian 32-bit integers, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).hexdigest()


def printable(name: str) -> str:
    """A file name without what would disturb a terminal."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
