"""A step as one array of 32-bit words, and back: so that it is one copy into shared memory.

All arrays of a `StepInputs` follow each other in the order of its fields, those of a `StepResult`
in the order of its columns; what is not int32 travels as the words it consists of.  The sizes
beside them say where each begins.  A reader gets views of the words and believes nothing: sizes
that do not add up to what is there are a ChannelError.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_serving.errors import ChannelError
from llm_serving.generation import SAMPLING_DTYPE
from llm_serving.protocol import InputSizes, ResultSizes
from llm_serving.step_arrays import Floats, Ints, StepInputs

__all__ = [
    "INPUT_NAMES",
    "RECORD_WORDS",
    "WORD",
    "ResultColumns",
    "pack_inputs",
    "pack_result",
    "unpack_inputs",
    "unpack_result",
]

Words = npt.NDArray[np.int32]

WORD = np.dtype(np.int32)
INPUT_NAMES = StepInputs.__struct_fields__[1:]  # without step_id
RECORD_WORDS = SAMPLING_DTYPE.itemsize // WORD.itemsize
_NUM_ARRAYS = len(INPUT_NAMES)
_TABLES, _SAMPLING, _BIASES = map(INPUT_NAMES.index, ("block_tables", "sampling", "bias_values"))
_ARRAYS = attrgetter(*INPUT_NAMES)
_FLOAT, _BOOL = np.dtype(np.float32), np.dtype(np.bool_)
_INPUT_DTYPES: dict[str, np.dtype[Any]] = dict.fromkeys(INPUT_NAMES, WORD)
_INPUT_DTYPES |= {"sampling": SAMPLING_DTYPE, "bias_values": _FLOAT}
_COLUMN_DTYPES: dict[str, np.dtype[Any]] = {
    "token_ids": WORD,
    "logprobs": _FLOAT,
    "top_ids": WORD,
    "top_logprobs": _FLOAT,
    "finite": _BOOL,
    "logits": _FLOAT,
}


class ResultColumns(Protocol):
    """What a step gives, see `StepResult`."""

    @property
    def token_ids(self) -> Ints: ...
    @property
    def logprobs(self) -> Floats: ...
    @property
    def top_ids(self) -> Ints: ...
    @property
    def top_logprobs(self) -> Floats: ...
    @property
    def finite(self) -> npt.NDArray[np.bool_]: ...
    @property
    def logits(self) -> Floats: ...


def pack_inputs(inputs: StepInputs) -> tuple[InputSizes, list[Words]]:
    """Its arrays as rows of words, to be copied behind each other.

    Raises ChannelError for an array of another dtype.
    """
    arrays: list[Any] = list(_ARRAYS(inputs))
    tables, sampling, biases = inputs.block_tables, inputs.sampling, inputs.bias_values
    if sampling.dtype != SAMPLING_DTYPE or biases.dtype != _FLOAT:
        raise _wrong_dtype(inputs, _INPUT_DTYPES)
    arrays[_TABLES], arrays[_BIASES] = tables.ravel(), biases.view(WORD)
    arrays[_SAMPLING] = sampling.view(WORD)
    for array in arrays:
        if array.dtype != WORD:
            raise _wrong_dtype(inputs, _INPUT_DTYPES)
    return InputSizes(tuple(map(len, arrays)), tables.shape[-1]), arrays


def unpack_inputs(step_id: int, sizes: InputSizes, words: Words) -> StepInputs:
    """Views of `words`.  Raises ChannelError for sizes that are not those of a step."""
    if words.dtype != WORD or words.ndim != 1:
        raise ChannelError(f"a step in {words.dtype} {words.shape}, not a row of int32")
    arrays: list[Any] = []
    begin = 0
    for size in sizes.words:
        end = begin + size
        arrays.append(words[begin:end])
        begin = end
    if len(arrays) != _NUM_ARRAYS or begin != len(words):
        raise ChannelError(f"a step of {_NUM_ARRAYS} arrays with the sizes {sizes.words}")
    try:
        arrays[_TABLES] = arrays[_TABLES].reshape(-1, sizes.table_width)
        arrays[_SAMPLING] = arrays[_SAMPLING].view(SAMPLING_DTYPE)
    except ValueError as exc:
        raise ChannelError(f"a step with the sizes {sizes}: {exc}") from exc
    arrays[_BIASES] = arrays[_BIASES].view(_FLOAT)
    return StepInputs(step_id, *arrays)


def pack_result(columns: ResultColumns) -> tuple[ResultSizes, list[Words]]:
    """As `pack_inputs`; raises ChannelError for columns that do not fit together, too."""
    ids, logprobs, finite = columns.token_ids, columns.logprobs, columns.finite
    top_ids, top_logprobs, logits = columns.top_ids, columns.top_logprobs, columns.logits
    n = len(ids)
    if (ids.dtype, logprobs.dtype, finite.dtype) != (WORD, _FLOAT, _BOOL) or (
        top_ids.dtype,
        top_logprobs.dtype,
        logits.dtype,
    ) != (WORD, _FLOAT, _FLOAT):
        raise _wrong_dtype(columns, _COLUMN_DTYPES)
    width = top_ids.shape[-1]
    if (
        not ids.shape == logprobs.shape == finite.shape == (n,)
        or not top_ids.shape == top_logprobs.shape == (n, width)
        or logits.ndim != 2
    ):
        shapes = {name: getattr(columns, name).shape for name in _COLUMN_DTYPES}
        raise ChannelError(f"a result whose columns have the shapes {shapes}")
    words = [ids, logprobs.view(WORD), finite.astype(WORD)]
    if width:
        words += [top_ids.ravel(), top_logprobs.ravel().view(WORD)]
    if len(logits):
        words.append(logits.ravel().view(WORD))
    return ResultSizes(n, width, *logits.shape), words


def unpack_result(
    sizes: ResultSizes, words: Words
) -> tuple[Ints, Floats, Ints, Floats, npt.NDArray[np.bool_], Floats]:
    """The columns of a StepResult from `token_ids` to `logits`, views of `words` where they can be.

    Raises ChannelError for sizes that are not those of the words.
    """
    n, width = sizes.num_samples, sizes.num_top
    num_logits, vocab_size = sizes.num_logits, sizes.vocab_size
    num_words = n * (3 + 2 * width) + num_logits * vocab_size
    if words.shape != (num_words,):
        raise ChannelError(f"a result of {words.shape} words with the sizes {sizes}")
    if words.dtype != WORD:
        raise ChannelError(f"a result of {words.dtype}, not of int32")
    floats = words.view(_FLOAT)
    top, bottom = 3 * n + n * width, 3 * n + 2 * n * width
    return (
        words[:n],
        floats[n : 2 * n],
        words[3 * n : top].reshape(n, width),
        floats[top:bottom].reshape(n, width),
        words[2 * n : 3 * n] != 0,
        floats[bottom:].reshape(num_logits, vocab_size),
    )


# Apart, because every step passes through the functions above, and they format nothing.
def _wrong_dtype(holder: object, wanted: dict[str, np.dtype[Any]]) -> ChannelError:
    for name, dtype in wanted.items():
        if (found := getattr(holder, name).dtype) != dtype:
            return ChannelError(f"{name}: an array of {found} cannot travel, one of {dtype} can")
    return ChannelError("an array whose type cannot travel")
