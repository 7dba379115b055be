"""Is this .safetensors file whole, and what is in it?  And how is a new one written in a stream?

The format: 8 bytes little-endian length, that many bytes of JSON (name -> dtype, shape, byte
range), then the tensors without gaps.  Only headers are read here; nothing is loaded.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from llm_serving.errors import ConfigError

__all__ = ["Header", "TensorInfo", "read_header", "write_safetensors"]

# The container's names and widths in bytes
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_WIDTHS |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


class TensorInfo(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Header(msgspec.Struct, frozen=True):
    tensors: dict[str, TensorInfo]
    raw: bytes
    data_start: int  # offset of the first tensor's bytes in the file
    size: int  # of the whole file, in bytes


def read_header(path: pathlib.Path) -> Header:
    """The header of the file at `path`; ConfigError if the file is not exactly what it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ConfigError(f"{path} is truncated, or not a safetensors file ({size} bytes)")
            raw = file.read(length)
    except OSError as exc:
        raise ConfigError(f"cannot read the weights: {exc}") from exc
    try:
        entries = msgspec.json.decode(raw, type=dict[str, Any])
        entries.pop("__metadata__", None)
        tensors = msgspec.convert(entries, dict[str, TensorInfo])
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise ConfigError(f"{path} has no valid safetensors header: {exc}") from exc
    header = Header(tensors, raw, 8 + length, size)
    _check_ranges(path, header)
    return header


def _check_ranges(path: pathlib.Path, header: Header) -> None:
    end = 0
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
        start, stop = info.data_offsets
        width = _WIDTHS.get(info.dtype)
        if start != end or (width and stop - start != math.prod(info.shape) * width):
            raise ConfigError(
                f"{path}: tensor {name} ({info.dtype} {info.shape}) can not lie at bytes "
                f"{start}..{stop}"
            )
        end = stop
    if header.data_start + end != header.size:
        raise ConfigError(
            f"{path} is truncated or damaged: its header describes {header.data_start + end} "
            f"bytes, the file has {header.size}"
        )


def write_safetensors(
    path: pathlib.Path,
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Iterable[bytes | memoryview],
) -> None:
    """Write tensors of one `dtype` (F32, F16, BF16), whose bytes come in the order of `shapes`.

    The pieces are written as they come and may be cut anywhere.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _WIDTHS[dtype]
        header[name] = TensorInfo(dtype, list(shape), (start, end))
    raw = msgspec.json.encode(header)
    raw += b" " * (-len(raw) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for piece in pieces:
            file.write(piece)
        file.flush()
        written = os.fstat(file.fileno()).st_size
    if written != 8 + len(raw) + end:
        raise ConfigError(f"{path}: wrote {written} bytes where {8 + len(raw) + end} were due")
