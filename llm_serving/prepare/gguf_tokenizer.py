"""Which tokenizer does a GGUF file hold?

The file's own, nothing else: vocabulary, merges or scores, the kind of every token, and whether
BOS and EOS are added.  Where a key is missing llama.cpp's default for that kind of tokenizer
holds: SentencePiece vocabularies add BOS, byte-level ones only if their pre-tokenizer says so.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from llm_serving.errors import ConfigError
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.json_file import Fields
from llm_serving.prepare.pre_tokenizers import find_pre_tokenizer
from llm_serving.prepare.sentencepiece_file import BYTE, NORMAL, UNUSED
from llm_serving.prepare.tokenizer_build import (
    add_bos_and_eos,
    byte_level_bpe,
    mark_added_tokens,
    sentencepiece_bpe,
)

__all__ = ["bos_and_eos_ids", "build_gguf_tokenizer"]

_PREFIX = "tokenizer.ggml."
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message


def build_gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Raises ConfigError, naming the key, for a tokenizer that can not be rebuilt exactly."""
    meta = _fields(file)
    tokens, types = _vocabulary(meta)
    kind = meta.values.get("model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(meta, tokens)
    elif kind == "llama":
        scores = _per_token(meta, "scores", float, len(tokens))
        prefix = meta.flag("add_space_prefix", True)
        tokenizer, adds_bos = sentencepiece_bpe(tokens, scores, types, add_prefix=prefix), True
    else:
        raise meta.unsupported("model", "gpt2 or llama")
    mark_added_tokens(tokenizer, tokens, types)
    bos = _token(meta, "bos_token_id", tokens) if meta.flag("add_bos_token", adds_bos) else None
    eos = _token(meta, "eos_token_id", tokens) if meta.flag("add_eos_token", False) else None
    add_bos_and_eos(tokenizer, bos, eos)
    return tokenizer


def bos_and_eos_ids(file: GgufFile) -> tuple[int | None, list[int]]:
    """The ids the file states: BOS, and every token that ends a text, a turn or a message."""
    meta = _fields(file)
    ends = [meta.optional_integer(key) for key in _END_KEYS]
    return meta.optional_integer("bos_token_id"), list(
        dict.fromkeys(i for i in ends if i is not None)
    )


def _fields(file: GgufFile) -> Fields:
    own = {
        key.removeprefix(_PREFIX): value
        for key, value in file.metadata.items()
        if key.startswith(_PREFIX)
    }
    return Fields(own, f"{file.path}: tokenizer.ggml")


def _vocabulary(meta: Fields) -> tuple[list[str], list[int]]:
    """(tokens, their types); an empty token gets a name nobody can type by accident."""
    given = meta.values.get("tokens")
    if not isinstance(given, list) or not given or not isinstance(given[0], str):
        raise ConfigError(f"{meta.where} has no tokens")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(given)]
    if len(set(tokens)) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if token in set(tokens[:index]))
        raise ConfigError(f"{meta.where}: the token {twice!r} is there twice")
    if "token_type" not in meta.values:
        return tokens, [NORMAL] * len(tokens)
    types = _per_token(meta, "token_type", int, len(tokens))
    # A name in place of an empty token must not be found in a text
    types = [kind if token else UNUSED for kind, token in zip(types, given, strict=True)]
    return tokens, [kind if NORMAL <= kind <= BYTE else NORMAL for kind in types]


def _byte_level(meta: Fields, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """(tokenizer, does its pre-tokenizer's family add BOS)"""
    pre = find_pre_tokenizer(str(meta.values.get("pre", "default")))
    merges: list[tuple[str, str]] = []
    for merge in _array(meta, "merges", str):
        left, _, right = merge[1:].partition(" ")  # the first character may be a space itself
        merges.append((merge[:1] + left, right))
    if not merges:
        raise ConfigError(f"{meta.where} has no merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = byte_level_bpe(vocabulary, merges, pre.build(), ignore_merges=pre.ignore_merges)
    return tokenizer, pre.add_bos


def _array(meta: Fields, key: str, kind: type) -> list[Any]:
    """The values of `key`, of `kind` each; none if there is no such key."""
    values = meta.values.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise meta.unsupported(key, f"an array of {kind.__name__}")
    return values


def _per_token(meta: Fields, key: str, kind: type, num_tokens: int) -> list[Any]:
    values = _array(meta, key, kind)
    if len(values) < num_tokens:
        raise ConfigError(f"{meta.where} has no {key} for each of its {num_tokens} tokens")
    return values[:num_tokens]


def _token(meta: Fields, key: str, tokens: list[str]) -> str:
    index = meta.optional_integer(key)
    if index is None or not 0 <= index < len(tokens):
        raise ConfigError(
            f"{meta.where}: {key} = {index} is to be added and is not in the vocabulary"
        )
    return tokens[index]
