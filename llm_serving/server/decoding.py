"""How do ids become text, one at a time, with nothing guessed?

A `Decoding` knows a tokenizer's decoder, a `TextState` is one text being decoded.  `push` answers
with the text that no later id can change, `pending` with what would follow if the text ended here:
everything pushed so far, with `pending` behind it, is what the library decodes.  Three kinds:

    ByteLevelDecoding      the ids' bytes are one stream of UTF-8; only an unfinished character
                           waits, never more than three bytes
    ByteFallbackDecoding   pieces, and runs of byte tokens: a run is text if all of it is valid,
                           else one U+FFFD a byte, so a valid run waits until it ends
    WholeDecoding          any other decoder: nothing is known before the end, so all of it waits

Special tokens and ids outside the vocabulary are left out before decoding, and part nothing.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

__all__ = [
    "ByteFallbackDecoding",
    "ByteLevelDecoding",
    "Decoding",
    "TextState",
    "WholeDecoding",
    "byte_alphabet",
]

TokenOf = Callable[[int], str | None]  # None: special, or no such id
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x(\+?[0-9A-Fa-f]{1,2})>")
_Utf8 = codecs.getincrementaldecoder("utf-8")


class TextState(Protocol):
    def push(self, token_id: int) -> str:
        """Add an id; the text that is settled now and was not before."""

    def pending(self) -> str:
        """What would follow if the text ended here; changes nothing."""

    def is_holding(self) -> bool:
        """Whether anything waits; in O(1)."""


class Decoding(Protocol):
    def start(self) -> TextState: ...

    def relevant(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The end of a prompt that leaves a state like the whole of it, and as much pending."""

    def text_of(self, token_id: int) -> str:
        """The text of one id on its own, for people to read."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: its own where that can be seen, else a higher."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class _BytesOf(dict[int, bytes]):
    """id -> bytes, worked out when first asked for."""

    def __init__(self, token_of: TokenOf) -> None:
        self._token_of = token_of
        self._alphabet = byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id) or ""
        if all(char in self._alphabet for char in token):
            self[token_id] = bytes(self._alphabet[char] for char in token)
        else:  # an added token that was never spelt in the alphabet
            self[token_id] = token.encode()
        return self[token_id]


class _ByteLevelText:
    __slots__ = ("_bytes_of", "_utf8")

    def __init__(self, bytes_of: _BytesOf) -> None:
        self._bytes_of = bytes_of
        self._utf8 = _Utf8("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of[token_id])

    def pending(self) -> str:
        return self._utf8.getstate()[0].decode("utf-8", "replace")

    def is_holding(self) -> bool:
        return self._utf8.getstate()[0] != b""


class ByteLevelDecoding:
    def __init__(self, token_of: TokenOf) -> None:
        self._bytes_of = _BytesOf(token_of)

    def start(self) -> TextState:
        return _ByteLevelText(self._bytes_of)

    def relevant(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        # An unfinished character has three bytes at most, and its first begins a new one anyway.
        num_bytes, start = 0, len(prompt_ids)
        while start and num_bytes < 3:
            start -= 1
            num_bytes += len(self._bytes_of[prompt_ids[start]])
        return prompt_ids[start:]

    def text_of(self, token_id: int) -> str:
        return self._bytes_of[token_id].decode("utf-8", "replace")


class _PieceOf(dict[int, str | int | None]):
    """id -> its text, its byte, or None if it is left out; worked out when first asked for."""

    def __init__(self, token_of: TokenOf, replace: Callable[[str], str], has_bytes: bool) -> None:
        self._token_of = token_of
        self._replace = replace
        self._has_bytes = has_bytes

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._token_of(token_id)
        piece: str | int | None = None if token is None else self._replace(token)
        if self._has_bytes and isinstance(piece, str):
            is_byte = len(piece) == 6 and (match := _BYTE_TOKEN.fullmatch(piece))
            piece = int(match[1], 16) if is_byte and match else piece
        self[token_id] = piece
        return piece


class _ByteFallbackText:
    __slots__ = ("_blank", "_is_ruined", "_num_blanks", "_num_bytes", "_piece_of", "_run", "_utf8")

    def __init__(self, piece_of: _PieceOf, blank: str, num_blanks: int) -> None:
        self._piece_of = piece_of
        self._blank = blank
        self._num_blanks = num_blanks  # so many may still be stripped from the front
        self._utf8 = _Utf8("strict")
        self._run = ""  # the whole characters of a run of bytes that is valid so far
        self._num_bytes = 0  # of that run; 0 for a ruined one, whose text is out already
        self._is_ruined = False

    def push(self, token_id: int) -> str:
        piece = self._piece_of[token_id]
        if piece is None:
            return ""
        if isinstance(piece, int):
            text = self._push_byte(piece)
        else:
            text = self._end_run() + piece if self._num_bytes or self._is_ruined else piece
        return self._strip(text) if self._num_blanks else text

    def pending(self) -> str:
        text = self._run_text()
        return text[self._num_leading(text) :]

    def is_holding(self) -> bool:
        return self._num_bytes > 0

    def _push_byte(self, byte: int) -> str:
        if self._is_ruined:
            return REPLACEMENT
        self._num_bytes += 1
        try:
            self._run += self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            num_ruined, self._num_bytes = self._num_bytes, 0
            self._run, self._is_ruined = "", True
            return REPLACEMENT * num_ruined
        return ""

    def _run_text(self) -> str:
        is_whole = not self._utf8.getstate()[0]
        return self._run if is_whole else REPLACEMENT * self._num_bytes

    def _end_run(self) -> str:
        text = "" if self._is_ruined else self._run_text()
        self._utf8.reset()
        self._run, self._num_bytes, self._is_ruined = "", 0, False
        return text

    def _num_leading(self, text: str) -> int:
        """How many characters at the front of the next text are to be stripped."""
        allowed = text[: self._num_blanks]
        return len(allowed) - len(allowed.lstrip(self._blank))

    def _strip(self, text: str) -> str:
        num_leading = self._num_leading(text)
        is_over = num_leading < len(text)
        self._num_blanks = 0 if is_over else self._num_blanks - num_leading
        return text[num_leading:]


class ByteFallbackDecoding:
    """`replace` is done to every token, then bytes are joined, then `num_blanks` stripped."""

    def __init__(
        self,
        token_of: TokenOf,
        replace: Callable[[str], str],
        *,
        has_bytes: bool = True,
        blank: str = " ",
        num_blanks: int = 0,
    ) -> None:
        self._piece_of = _PieceOf(token_of, replace, has_bytes)
        self._blank = blank
        self._num_blanks = num_blanks

    def start(self) -> TextState:
        return _ByteFallbackText(self._piece_of, self._blank, self._num_blanks)

    def relevant(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        # After a piece with more than blanks no run is open and nothing is stripped any more.
        for start in range(len(prompt_ids) - 1, 0, -1):
            piece = self._piece_of[prompt_ids[start]]
            if isinstance(piece, str) and piece.strip(self._blank):
                return prompt_ids[start:]
        return prompt_ids

    def text_of(self, token_id: int) -> str:
        piece = self._piece_of[token_id]
        if isinstance(piece, int):
            return bytes((piece,)).decode("utf-8", "replace")
        return piece or ""


class _WholeText:
    __slots__ = ("_decode", "_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def pending(self) -> str:
        return self._decode(self._ids)

    def is_holding(self) -> bool:
        return bool(self._ids)


class WholeDecoding:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def start(self) -> TextState:
        return _WholeText(self._tokenizer.decode)

    def relevant(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        return prompt_ids

    def text_of(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])
