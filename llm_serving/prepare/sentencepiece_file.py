"""What is in a tokenizer.model?  SentencePiece's protobuf, read without the library.

The message is ModelProto of sentencepiece_model.proto; only the fields that decide ids are taken.
Protobuf's wire format: a varint key (field << 3 | type), then a varint, 8 bytes, a length and that
many bytes, or 4 bytes.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator

import msgspec

from llm_serving.errors import ConfigError

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "SentencePieceModel"]

# Types of a piece; GGUF's tokenizer.ggml.token_type has the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2

Value = int | bytes


class SentencePieceModel(msgspec.Struct, frozen=True):
    """A BPE model that changes nothing in the text but spaces, as LLaMA's is."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    add_dummy_prefix: bool

    @classmethod
    def read(cls, path: pathlib.Path) -> SentencePieceModel:
        """Raises ConfigError, naming the field, for a model of another kind."""
        try:
            return cls._parse(path.read_bytes(), str(path))
        except (IndexError, struct.error, UnicodeDecodeError, TypeError) as exc:
            raise ConfigError(f"{path} is not a SentencePiece model, or is damaged") from exc
        except OSError as exc:
            raise ConfigError(f"cannot read the tokenizer: {exc}") from exc

    @classmethod
    def _parse(cls, message: bytes, where: str) -> SentencePieceModel:
        pieces, scores, types = [], [], []
        trainer: dict[int, Value] = {}
        normalizer: dict[int, Value] = {}
        for field, value in _fields(message):
            if field == 1:
                piece = dict(_fields(_bytes(value)))
                pieces.append(_bytes(piece[1]).decode() if 1 in piece else "")
                scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
                types.append(_number(piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_fields(_bytes(value)))
            elif field == 3:
                normalizer = dict(_fields(_bytes(value)))
        if not pieces or trainer.get(3, 1) != _BPE:
            raise ConfigError(
                f"{where}: model_type {trainer.get(3, 1)!r} is not supported, 2 (BPE) is"
            )
        _refuse_rewriting(normalizer, where)
        ids = [_number(trainer.get(field, default)) for field, default in ((41, 1), (42, 2))]
        bos, eos = (i if i < 1 << 63 else -1 for i in ids)  # -1 is written as 64 bits of ones
        return cls(pieces, scores, types, bos, eos, bool(normalizer.get(3, 1)))


def _refuse_rewriting(normalizer: dict[int, Value], where: str) -> None:
    if normalizer.get(2, b""):
        name = _bytes(normalizer.get(1, b"")).decode()
        raise ConfigError(f"{where}: normalizer {name!r} is not supported, 'identity' is")
    if normalizer.get(4, 1):
        raise ConfigError(f"{where}: remove_extra_whitespaces = true is not supported, false is")
    if not normalizer.get(5, 1):
        raise ConfigError(f"{where}: escape_whitespaces = false is not supported, true is")


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield field, number
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, at = _varint(message, at)
        if length is None or at + length > len(message):
            raise IndexError(at)
        yield field, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, the index behind it)."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where bytes belong")
    return value


def _number(value: Value) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes where a number belongs")
    return value
