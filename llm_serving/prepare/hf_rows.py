"""The rows of a Hugging Face checkpoint's tensors, mapped from its shards."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_serving.prepare.dtypes import widen
from llm_serving.prepare.safetensors_file import TensorInfo, read_header

__all__ = ["HfRows"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]


class HfRows:
    """A `packing.RowSource`; the shards were checked by `hf_folder`."""

    def __init__(self, shards: Sequence[pathlib.Path]) -> None:
        self._tensors: dict[str, tuple[TensorInfo, Bytes]] = {}
        for path in shards:
            header = read_header(path)
            body = np.asarray(np.memmap(path, np.uint8, "r"))[header.data_start :]
            for name, info in header.tensors.items():
                start, stop = info.data_offsets
                width = (stop - start) // math.prod(info.shape[:1])
                self._tensors[name] = info, body[start:stop].reshape(-1, width)

    def kind(self, name: str) -> str:
        return self._tensors[name][0].dtype

    def raw(self, name: str, rows: Rows) -> Bytes:
        found: Bytes = self._tensors[name][1][rows]
        return found

    def floats(self, name: str, rows: Rows) -> Floats:
        info, _ = self._tensors[name]
        values = widen(self.raw(name, rows).tobytes(), info.dtype)
        return values.reshape(len(rows), -1) if len(info.shape) > 1 else values

    def block_kind(self, name: str) -> str:
        return "F32" if self.kind(name) == "F32" else "BF16"

    def blocks(self, name: str, rows: Rows, kind: str) -> Bytes:
        raise NotImplementedError(f"{name}: a checkpoint of Hugging Face has no blocks")
