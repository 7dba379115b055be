"""Which text has a request generated so far, and which of it is settled?

The decoded text of an output is decode(prompt + output) minus decode(prompt), special tokens
skipped.  A prompt may end inside a character; then decode(prompt + output) need not start with
decode(prompt), and what is taken away is their longest common prefix:

    prompt  ... E2 82           decode(prompt)           ... U+FFFD
    output          AC 21       decode(prompt + output)  ... EURO SIGN !
    decoded text                                         EURO SIGN !

All pieces together are the decoded text, whatever the ids.  An id costs O(1), amortised, for the
decoders that are known (see `decoding`); what is not settled is held back, and comes with `flush`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders

from llm_serving.server.decoding import (
    ByteFallbackDecoding,
    ByteLevelDecoding,
    Decoding,
    WholeDecoding,
)

__all__ = ["Detokenizer", "decoder_steps", "decoding_of"]


class Detokenizer:
    __slots__ = ("_prompted", "_state")

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int]) -> None:
        self._state = decoding.start()
        for token_id in decoding.relevant(prompt_ids):
            self._state.push(token_id)
        self._prompted = self._state.pending()  # the end of decode(prompt) that is not settled

    def push(self, token_id: int) -> str:
        """Add an id of the output; the text that has become certain."""
        text = self._state.push(token_id)
        return self._beyond_prompt(text) if self._prompted and text else text

    def flush(self) -> str:
        """All the rest: the output has ended here.  Nothing may be pushed after it."""
        return self._beyond_prompt(self._state.pending())

    def is_holding(self) -> bool:
        """Whether `flush` could have text for us."""
        return self._state.is_holding()

    def _beyond_prompt(self, text: str) -> str:
        """`text` less what the prompt had already, up to their first difference."""
        num_same = _num_same(text, self._prompted)
        self._prompted = self._prompted[num_same:] if num_same == len(text) else ""
        return text[num_same:]


def _num_same(a: str, b: str) -> int:
    """The length of the longest common prefix."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def decoding_of(tokenizer: Tokenizer) -> Decoding:
    """The way to decode what this tokenizer's `decoder` says."""
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }

    def token_of(token_id: int) -> str | None:
        token = tokenizer.id_to_token(token_id)
        return None if token in special else token

    steps = decoder_steps(tokenizer)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelDecoding(token_of)
    return _byte_fallback(steps, token_of) or WholeDecoding(tokenizer)


def decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps in order, sequences unpacked; empty without a decoder."""
    if tokenizer.decoder is None:
        return []

    def unpack(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] != "Sequence":
            return [step]
        return [inner for outer in step["decoders"] for inner in unpack(outer)]

    return unpack(json.loads(tokenizer.decoder.__getstate__()))


def _byte_fallback(
    steps: Sequence[dict[str, Any]], token_of: Callable[[int], str | None]
) -> ByteFallbackDecoding | None:
    """Replace ..., ByteFallback and Fuse, perhaps Strip from the front; None if not that."""
    num_replaces = next((i for i, s in enumerate(steps) if s["type"] != "Replace"), len(steps))
    replaces, rest = steps[:num_replaces], list(steps[num_replaces:])
    if [step["type"] for step in rest[:2]] != ["ByteFallback", "Fuse"]:
        return None
    replace = _replacing(replaces)
    match rest[2:]:
        case []:
            return ByteFallbackDecoding(token_of, replace)
        case [{"type": "Strip", "content": blank, "start": num_blanks, "stop": 0}]:
            return ByteFallbackDecoding(token_of, replace, blank=blank, num_blanks=num_blanks)
    return None


def _replacing(steps: Sequence[dict[str, Any]]) -> Callable[[str], str]:
    """The library's own Replace, for one token at a time."""
    if not steps:
        return str
    each = []
    for step in steps:
        (kind, pattern), content = next(iter(step["pattern"].items())), step["content"]
        each.append(decoders.Replace(Regex(pattern) if kind == "Regex" else pattern, content))
    chain = decoders.Sequence(each)
    return lambda token: chain.decode([token])
