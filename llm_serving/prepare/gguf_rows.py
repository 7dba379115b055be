"""The rows of a GGUF file's tensors in Hugging Face's order, as stored or as numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quant
from gguf import dequantize, quantize
from gguf.quants import Q4_K

from llm_serving.model_card import ModelConfig
from llm_serving.prepare.gguf_file import GgufFile, GgufTensor
from llm_serving.prepare.gguf_weights import gguf_name, stored_rows

__all__ = ["GgufRows", "q4_k_to_q4_1"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]

_NEAREST = {
    **{kind: kind.name for kind in (Quant.Q8_0, Quant.Q4_0, Quant.Q4_1, Quant.F32, Quant.BF16)},
    Quant.Q4_K: "Q4_1",
    Quant.Q5_K: "Q8_0",
    Quant.Q6_K: "Q8_0",
    Quant.F16: "BF16",
}


class GgufRows:
    """A `packing.RowSource`."""

    def __init__(self, file: GgufFile, architecture: str, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._is_turned = architecture == "LlamaForCausalLM"

    def kind(self, name: str) -> str:
        return self._tensor(name).type.name

    def raw(self, name: str, rows: Rows) -> Bytes:
        order = stored_rows(name, self._config) if self._is_turned else None
        found: Bytes = self._tensor(name).data[rows if order is None else order[rows]]
        return found

    def floats(self, name: str, rows: Rows) -> Floats:
        tensor = self._tensor(name)
        if len(tensor.shape) > 1:
            found: Floats = dequantize(self.raw(name, rows), tensor.type)
            return found
        values = dequantize(tensor.data, tensor.type).reshape(-1)
        order = stored_rows(name, self._config) if self._is_turned else None
        vector: Floats = values[rows if order is None else order[rows]]
        return vector

    def block_kind(self, name: str) -> str:
        return _NEAREST[self._tensor(name).type]

    def blocks(self, name: str, rows: Rows, kind: str) -> Bytes:
        stored = self._tensor(name).type
        if stored.name == kind:
            return self.raw(name, rows)
        if stored is Quant.Q4_K and kind == "Q4_1":
            return q4_k_to_q4_1(self.raw(name, rows))
        return quantize(self.floats(name, rows), Quant[kind])

    def _tensor(self, name: str) -> GgufTensor:
        return self._file.tensors[gguf_name(name)]


def q4_k_to_q4_1(rows: Bytes) -> Bytes:
    """Blocks of 256 with 6-bit scales -> blocks of 32 with float16 scales, the quants untouched.

    A Q4_K weight is d * scale * q - dmin * min (ggml-quants): scale and minimum become d and m of a
    Q4_1 block, rounded to float16, which is less than 2**-11 of either.
    """
    blocks = rows.reshape(-1, 144)
    d, dmin = (blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
    scales, mins = Q4_K.get_scale_min(blocks[:, 4:16])
    out = np.empty((len(blocks), 8, 20), np.uint8)
    out[:, :, 0:2] = (d * scales).astype("<f2")[..., None].view(np.uint8)
    out[:, :, 2:4] = (-dmin * mins).astype("<f2")[..., None].view(np.uint8)
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    quants = np.concatenate((packed & 15, packed >> 4), 2).reshape(-1, 8, 32)
    out[:, :, 4:] = quants[:, :, :16] | quants[:, :, 16:] << 4
    return out.reshape(len(rows), -1)
