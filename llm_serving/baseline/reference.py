"""The model as transformers computes it: float32, on the processor, one sequence at a time.

Loaded from what the user named, not from what `prepare` made of it, so that a mistake in preparing
shows as a difference, too.  Long texts go through in chunks, and only logits that somebody wants
are computed, so that memory does not grow with chunks times vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard

__all__ = ["Reference"]

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

_CHUNK = 256  # tokens, and so at most as many rows of logits


class Reference:
    def __init__(self, model: Any) -> None:
        """`model` is one of transformers, with weights in float32."""
        self._model = model

    @classmethod
    def load(
        cls, card: ModelCard, *, num_threads: int | None = None, quiet: bool = False
    ) -> Reference:
        """The original that `card` was made of.  Raises ConfigError if transformers refuses it.

        `quiet` keeps transformers' own progress bars from stderr.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        source = pathlib.Path(card.source)
        place: dict[str, Any] = {"pretrained_model_name_or_path": source, "use_safetensors": True}
        if source.suffix == ".gguf":
            place = {
                "pretrained_model_name_or_path": source.parent,
                "gguf_file": source.name,
                "quantization_config": GgufConfig(dequantize=True),
                "vocab_size": card.config.vocab_size,  # else it is taken from the tokenizer
            }
        sink = io.StringIO() if quiet else sys.stderr
        try:
            with contextlib.redirect_stderr(sink):
                model: Any = AutoModelForCausalLM.from_pretrained(
                    **place, dtype=torch.float32, local_files_only=True
                )
        except (OSError, ValueError, ImportError, RuntimeError) as exc:
            raise ConfigError(
                f"transformers {transformers.__version__} cannot load {source}: {_first(exc)}"
            ) from exc
        return cls(model.eval())

    def logits_at(self, ids: Ids, positions: Sequence[int]) -> Iterator[tuple[int, Logits]]:
        """The logits behind each of these positions of one text, in rising order."""
        reading = _Reading(self._model)
        positions = sorted(positions)
        for start in range(0, positions[-1] + 1, _CHUNK):
            stop = min(start + _CHUNK, positions[-1] + 1)
            wanted = [position for position in positions if start <= position < stop]
            yield from zip(wanted, reading.feed(ids[start:stop], wanted), strict=True)

    def greedy(
        self, prompt: Ids, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, Logits]]:
        """(id, the logits it was taken from) of every new token, up to the first EOS."""
        reading = _Reading(self._model)
        for start in range(0, len(prompt), _CHUNK):
            chunk = prompt[start : start + _CHUNK]
            is_last = start + len(chunk) == len(prompt)
            rows = reading.feed(chunk, [len(prompt) - 1] if is_last else [])
        for num_left in range(max_new_tokens - 1, -1, -1):
            (logits,) = rows
            token_id = int(logits.argmax())
            yield token_id, logits
            if num_left == 0 or token_id in eos_token_ids:
                return
            rows = reading.feed(np.array([token_id], np.int32), [reading.num_tokens])


class _Reading:
    """One text on its way through the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self.num_tokens = 0

    def feed(self, ids: Ids, positions: Sequence[int]) -> list[Logits]:
        """Read on; the logits behind those positions, all of which are among `ids`."""
        places = torch.tensor(
            [position - self.num_tokens for position in positions], dtype=torch.int64
        )
        with torch.inference_mode():
            output = self._model(
                torch.from_numpy(ids.astype(np.int64))[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=places,
            )
        self._cache = output.past_key_values
        self.num_tokens += len(ids)
        return [np.array(row, np.float32) for row in output.logits[0].numpy()]


def _first(exc: Exception) -> str:
    """The first line of what went wrong."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:300]
