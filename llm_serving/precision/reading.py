"""What does one .npy file hold?  Nothing is ever unpickled, and no header is believed.

Whatever cannot be read as one row of finite or infinite floats is named with what is wrong.
"""

from __future__ import annotations

import ast
import os
import pathlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["UNPICKLE", "Floats", "Unreadable", "read_logits"]

Floats = npt.NDArray[np.float64]

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes
_FLOATS = {f"{order}f{size}" for order in "<>=" for size in (2, 4, 8)}
UNPICKLE = """\
A pickled baseline is never loaded here: a pickle can run any code.  If you trust it, convert it
where the framework that wrote it (MindSpore, for example) is installed:

    import glob, numpy
    for path in glob.glob({pattern!r}):
        value = numpy.load(path, allow_pickle=True)
        while getattr(value, "dtype", None) == object:
            value = value.item()
        value = value.asnumpy() if hasattr(value, "asnumpy") else value
        numpy.save(path, numpy.asarray(value, dtype="float32"))
"""


class Unreadable(Exception):
    """A file that holds no logits; says why, and where it lies once that is known."""

    def __init__(
        self, why: str, *, is_pickle: bool = False, folder: pathlib.Path | None = None
    ) -> None:
        super().__init__(why)
        self.is_pickle = is_pickle
        self.folder = folder


@dataclass(frozen=True, slots=True)
class Header:
    dtype: np.dtype[Any]
    num_logits: int


def read_logits(path: pathlib.Path) -> tuple[Header, Floats]:
    """The logits in float64, and what they were in the file.  Raises Unreadable.

    What the header promises is believed only if the file is exactly so long.
    """
    try:
        if not path.is_file():
            raise Unreadable("is not a file" if path.exists() else "is not there")
        with path.open("rb") as file:
            header = _read_header(file)
            values = np.fromfile(file, header.dtype, header.num_logits)
    except OSError as exc:
        raise Unreadable(f"cannot be read: {exc.strerror or exc}") from exc
    if len(values) != header.num_logits:
        raise Unreadable("is cut: it became shorter while it was read")
    return header, values.astype(np.float64)


def _read_header(file: BinaryIO) -> Header:
    start = file.read(8)
    if not start:
        raise Unreadable("is empty")
    if start[:1] == b"\x80":
        raise Unreadable("is pickled", is_pickle=True)
    if not start.startswith(_MAGIC):
        raise Unreadable("is no .npy file")
    if len(start) < 8:
        raise Unreadable("is cut inside its header")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _MAX_HEADER:
        raise Unreadable(f"is broken: a header of {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise Unreadable("is cut inside its header")
    dtype, num_logits = _parse_header(text)
    expected = num_logits * dtype.itemsize
    found = os.fstat(file.fileno()).st_size - file.tell()
    if found != expected:
        what = "is cut" if found < expected else "is broken"
        raise Unreadable(f"{what}: {found} bytes of numbers where its header says {expected}")
    return Header(dtype, num_logits)


def _parse_header(text: bytes) -> tuple[np.dtype[Any], int]:
    try:
        value = ast.literal_eval(text.decode("latin1").strip())
        descr, shape = value["descr"], value["shape"]
        if not isinstance(shape, tuple) or any(type(n) is not int for n in shape):
            raise TypeError("shape")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as exc:
        raise Unreadable("is broken: its header makes no sense") from exc
    if descr == "|O":
        raise Unreadable("holds pickled objects", is_pickle=True)
    if descr not in _FLOATS:
        hint = " (bfloat16 must be saved as float32)" if str(descr).endswith("V2") else ""
        raise Unreadable(f"holds {descr!r:.40}, not float16, float32 or float64{hint}")
    if not 1 <= len(shape) <= 3 or any(n != 1 for n in shape[:-1]):
        raise Unreadable(f"has the shape {shape!r:.60}, not (V,), (1, V) or (1, 1, V)")
    if shape[-1] < 1:
        raise Unreadable("holds no numbers")
    return np.dtype(descr), shape[-1]
