"""What is in a GGUF file?  Its metadata, and where each tensor's bytes lie.

Little-endian versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version u32, tensors u64, keys u64
    key: string, type u32, value            string: length u64, UTF-8
    tensor: name, dims u32, dim u64 ..., type u32, offset u64
    padding, then the tensors' bytes, each at its offset

Read in one pass over a memory map; the `gguf` package's own reader makes an array of every
element and takes seconds for a vocabulary.  Dimensions are turned round: [rows, columns].
"""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any

import msgspec
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llm_serving.errors import ConfigError

__all__ = ["GgufFile", "GgufTensor"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # of ggml
_MAX_NESTING = 8  # of arrays; far beyond what any converter writes


class GgufTensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]  # [rows, columns] or [columns]
    type: GGMLQuantizationType
    data: Bytes  # [rows, bytes of a row], or [1, bytes]; a view of the mapped file

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class GgufFile:
    """Raises ConfigError, naming the reason, for a file that is not a whole GGUF."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._bytes: Bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as exc:  # ValueError: an empty file can not be mapped
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        self._view = self._bytes.data
        self._at = 0
        try:
            self._parse()
        except (struct.error, IndexError, UnicodeDecodeError) as exc:
            size = len(self._bytes)
            raise ConfigError(
                f"{path} is truncated or damaged: nothing readable at byte {self._at} of {size}"
            ) from exc

    def _parse(self) -> None:
        if bytes(self._view[:4]) != b"GGUF":
            raise ConfigError(f"{self.path} is not a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ConfigError(
                f"{self.path}: GGUF version {version:#x} is not supported, 2 and 3 are"
            )
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(key, self._scalar("I"))
        seen: set[str] = set()
        headers = [self._tensor_header(seen) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ConfigError(f"{self.path}: general.alignment = {alignment!r} is not supported")
        start = math.ceil(self._at / alignment) * alignment
        for name, shape, kind, offset in headers:
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor_header(self, seen: set[str]) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        if name in seen:
            raise ConfigError(f"{self.path} has two tensors {name}")
        seen.add(name)
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise ConfigError(
                f"{self.path}: tensor {name} has {num_dims} dimensions, {_MAX_DIMS} are the most"
            )
        dims = tuple(self._scalar("Q") for _ in range(num_dims))
        if 0 in dims:
            raise ConfigError(f"{self.path}: tensor {name} {list(dims)} has a dimension of 0")
        return name, dims[::-1], self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        known = {int(each) for each in GGMLQuantizationType}
        if kind not in known:
            raise ConfigError(f"{self.path}: tensor {name} has the unknown type {kind}")
        quant = GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[quant]
        if not shape or shape[-1] % block:
            raise ConfigError(
                f"{self.path}: tensor {name} {list(shape)} is not whole {quant.name} blocks"
            )
        row = shape[-1] // block * width
        stop = start + math.prod(shape[:-1]) * row
        if stop > len(self._bytes):
            raise ConfigError(
                f"{self.path} is truncated: tensor {name} ends at byte {stop}, the file has "
                f"{len(self._bytes)}"
            )
        data = np.frombuffer(self._view[start:stop], np.uint8).reshape(-1, row)
        return GgufTensor(name, shape, quant, data)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._view, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._view):
            raise IndexError(self._at)
        return str(self._view[start : self._at], "utf-8")

    def _value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ConfigError(f"{self.path}: key {key} has the unknown type {kind}")
        if depth == _MAX_NESTING:
            raise ConfigError(f"{self.path}: key {key} is arrays in arrays, over {depth} deep")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner not in _SCALARS:
            return [self._value(key, inner, depth + 1) for _ in range(count)]
        code = f"<{count}{_SCALARS[inner]}"
        values = struct.unpack_from(code, self._view, self._at)
        self._at += struct.calcsize(code)
        return list(values)
