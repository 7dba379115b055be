"""Text to ids and back, as the model's own tokenizer.json says.

Nothing is added that the file does not ask for: BOS only if its post-processor puts it there.
No state is changed after loading, so any thread may encode; long texts release the interpreter
lock while they are encoded.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import tokenizers

from llm_serving.errors import ConfigError
from llm_serving.server.detokenizer import Detokenizer, decoder_steps, decoding_of

__all__ = ["Tokenizer"]


class Tokenizer:
    def __init__(self, path: pathlib.Path | str) -> None:
        """Raises ConfigError for a file that is no tokenizer.json, or cannot be decoded with."""
        self._tokenizer = _load(str(path))
        self._decoding = decoding_of(self._tokenizer)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Special tokens in `text` are recognised, and the file's own post-processor is applied.

        `text` must be valid Unicode.
        """
        # Unlike `encode`, a batch is encoded without the interpreter lock.
        return self._tokenizer.encode_batch_fast([text])[0].ids

    def spans(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int, int]]:
        """As `encode`: each id with the characters of `text` it stands for, [start, stop)."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return [(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def new_detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """For the text that follows this prompt."""
        return Detokenizer(self._decoding, prompt_ids)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """The text of one id on its own; "" for a special token or one that does not exist."""
        return "" if token_id in self._special_ids else self._decoding.text_of(token_id)


def _load(path: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as exc:  # the library raises nothing narrower
        raise ConfigError(f"cannot read the tokenizer {path}: {exc}") from exc
    for step in decoder_steps(tokenizer):
        if step["type"] == "Strip" and step["stop"] > 0:  # the library panics on an empty text
            raise ConfigError(
                f"{path}: its decoder has a Strip with stop {step['stop']}; only 0 is supported"
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
