"""A file of packed weights, which an agent maps and multiplies with where it lies.

    8 bytes little-endian length, that many bytes of JSON: `Header`
    then each part at a multiple of 64 bytes

Linear layers stand under the names of the model's fused layers, model.layers.0.self_attn.qkv_proj,
norms under their checkpoint names.  The embedding is kept as rows of its source, and read row by
row.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError
from llm_serving.kernels.cpu.layout import LAYOUT_VERSION

__all__ = ["PackedFile", "PackedWriter", "Part"]

_ALIGNMENT = 64
Bytes = npt.NDArray[np.uint8]


class Part(msgspec.Struct, frozen=True):
    kind: str  # "linear", "rows" or "vector"
    format: str  # of a linear: a name of `Format`; of rows: of `Source`; of a vector: "F32"
    shape: tuple[int, ...]  # [out, in], [rows, columns] or [n]
    start: int  # offset in the file's body
    num_bytes: int
    bias: int | None = None  # offset of a linear's float32 [out]


class Header(msgspec.Struct, frozen=True):
    layout: int
    parts: dict[str, Part]


class PackedWriter:
    """Parts are written as they come; the header when all are there."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._body = path.with_suffix(".body")
        self._file: BinaryIO = self._body.open("w+b")
        self._parts: dict[str, Part] = {}
        self._at = 0

    def add(
        self,
        name: str,
        kind: str,
        format: str,
        shape: tuple[int, ...],
        pieces: Iterator[Bytes],
        bias: npt.NDArray[np.float32] | None = None,
    ) -> None:
        start = self._at
        for piece in pieces:
            self._file.write(piece.data)
            self._at += piece.nbytes
        num_bytes = self._at - start
        self._pad()
        bias_at = None
        if bias is not None:
            bias_at = self._at
            self._file.write(bias.astype("<f4").tobytes())
            self._at += 4 * len(bias)
            self._pad()
        self._parts[name] = Part(kind, format, shape, start, num_bytes, bias_at)

    def close(self) -> None:
        """Put the header in front.  The body is copied once, by the kernel."""
        raw = msgspec.json.encode(Header(LAYOUT_VERSION, self._parts))
        raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
        self._file.flush()
        with self._path.open("wb") as whole:
            whole.write(len(raw).to_bytes(8, "little") + raw)
            whole.flush()
            self._file.seek(0)
            done = 0
            while done < self._at:
                done += os.sendfile(whole.fileno(), self._file.fileno(), done, self._at - done)
        self._file.close()
        self._body.unlink()

    def _pad(self) -> None:
        padding = -self._at % _ALIGNMENT
        self._file.write(bytes(padding))
        self._at += padding


class PackedFile:
    """Raises ConfigError for a file that is none, or of another layout."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            self._bytes: Bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read the packed weights {path}: {exc}") from exc
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        try:
            header = msgspec.json.decode(self._bytes[8 : 8 + length].tobytes(), type=Header)
        except msgspec.DecodeError as exc:
            raise ConfigError(f"{path} is no file of packed weights: {exc}") from exc
        if header.layout != LAYOUT_VERSION:
            raise ConfigError(
                f"{path} has layout {header.layout}, this release reads {LAYOUT_VERSION}; "
                "prepare the model again"
            )
        self.parts = header.parts
        self._start = 8 + length
        ends = [part.start + part.num_bytes for part in self.parts.values()]
        if self._start + max(ends, default=0) > len(self._bytes):
            raise ConfigError(f"{path} is truncated; prepare the model again")

    def part(self, name: str) -> Part:
        if (found := self.parts.get(name)) is None:
            raise ConfigError(f"{self.path} has no {name}; prepare the model again")
        return found

    def data(self, name: str) -> Bytes:
        """The bytes of a part, aligned to 64, mapped."""
        part = self.part(name)
        return self._slice(part.start, part.num_bytes)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.data(name).view("<f4")
        return found

    def bias(self, name: str) -> npt.NDArray[np.float32] | None:
        part = self.part(name)
        if part.bias is None:
            return None
        found: npt.NDArray[Any] = self._slice(part.bias, 4 * part.shape[0]).view("<f4")
        return found

    def _slice(self, start: int, num_bytes: int) -> Bytes:
        # a plain array: numpy's memmap pays for its subclass at every use
        return np.asarray(self._bytes)[self._start + start : self._start + start + num_bytes]
