"""What is known of every file with logits: one JSON object a line, beside the files.

Lines are appended, each with one write, after the file that they describe is there under its name.
A server that is killed leaves at most one half line; who appends next ends it, who reads counts it.
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm_serving.errors import ConfigError

__all__ = ["MANIFEST_NAME", "Manifest", "ManifestEntry", "ManifestWriter", "read_manifest"]

MANIFEST_NAME = "manifest.jsonl"


class ManifestEntry(msgspec.Struct, frozen=True, eq=False):
    file: str
    key: str
    position: int  # of the last token seen
    token_ids: np.ndarray[Any, np.dtype[np.int32]]  # all of them, 0 .. position
    digest: str  # of token_ids; see naming.prefix_digest
    time: float
    model: str = ""
    model_digest: str = ""  # as the model card has it
    dtype: str = ""  # what the logits were computed in
    weights: str = ""  # what the weights were in their file: "Q4_1", "bfloat16"
    kernels: str = ""  # backends, joined by "+"
    source: str = ""  # server | transformers


@dataclass(frozen=True, slots=True)
class Manifest:
    entries: list[ManifestEntry]
    broken_lines: list[int]  # counted from 1


class ManifestWriter:
    def __init__(self, folder: pathlib.Path) -> None:
        """Open the manifest of `folder`, or begin it; OSError if that is not possible."""
        path = folder / MANIFEST_NAME
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._is_at_line_start = _ends_a_line(self._file)

    def append(self, entry: ManifestEntry) -> None:
        """Raises OSError; a line that was cut by it is ended by the next."""
        line = _ENCODER.encode(entry) + b"\n"
        if not self._is_at_line_start:
            line = b"\n" + line
        self._is_at_line_start = False
        written = os.write(self._file, line)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes of a manifest line were written")
        self._is_at_line_start = True

    def close(self) -> None:
        os.close(self._file)


def read_manifest(path: pathlib.Path) -> Manifest:
    """Of a manifest file, or of the folder it lies in.  Raises ConfigError if there is none."""
    entries, broken = [], []
    try:
        with (path / MANIFEST_NAME if path.is_dir() else path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entries.append(_checked(_DECODER.decode(line)))
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    broken += [number] if line.strip() else []
    except OSError as exc:
        raise ConfigError(f"cannot read the manifest {path}: {exc.strerror}") from exc
    return Manifest(entries, broken)


def _checked(entry: ManifestEntry) -> ManifestEntry:
    if entry.position != len(entry.token_ids) - 1:
        raise ValueError("position is not that of the last id")
    return entry


def _ends_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"


def _to_list(value: Any) -> Any:
    return value.tolist()


def _to_ids(kind: type, value: Any) -> npt.NDArray[np.int32]:
    """Raises ValueError for anything but a flat list of ids."""
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise ValueError("token_ids is not a list of ids")
    return np.array(value, np.int32)


_ENCODER = msgspec.json.Encoder(enc_hook=_to_list)
_DECODER = msgspec.json.Decoder(ManifestEntry, dec_hook=_to_ids)
