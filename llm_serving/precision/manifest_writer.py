"""Lines for a manifest, each appended with one write.

A line comes after the file that it describes is there under its name.  A server that is killed
leaves at most one half line; who appends next ends it.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import msgspec

from llm_serving.precision.manifest import MANIFEST_NAME, ManifestEntry

__all__ = ["ManifestWriter"]


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


def _ends_a_line(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"


def _to_list(value: Any) -> Any:
    return value.tolist()


_ENCODER = msgspec.json.Encoder(enc_hook=_to_list)
