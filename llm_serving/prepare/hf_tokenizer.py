"""Which tokenizer does a Hugging Face folder hold?

tokenizer.json is used as it is, its post-processor included: transformers 5, too, ignores
`add_bos_token` and `add_eos_token` of tokenizer_config.json where there is a tokenizer.json.  With
only a tokenizer.model the two settings decide, and none means none (again as transformers 5); the
ids are those of SentencePiece itself, which transformers loses where a text begins with a space.
"""

from __future__ import annotations

import pathlib
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llm_serving.errors import ConfigError
from llm_serving.prepare.json_file import Fields, read_object
from llm_serving.prepare.sentencepiece_file import SentencePieceModel
from llm_serving.prepare.tokenizer_build import (
    add_bos_and_eos,
    mark_added_tokens,
    sentencepiece_bpe,
)

__all__ = ["build_hf_tokenizer", "read_chat_template"]


def build_hf_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Raises ConfigError if there is none, or none that can be read."""
    settings = Fields(
        read_object(folder / "tokenizer_config.json") or {}, f"{folder}/tokenizer_config.json"
    )
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read(folder / "tokenizer.json")
        tokenizer.no_truncation()  # a prompt is never cut behind the client's back
        tokenizer.no_padding()
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _from_sentencepiece(folder, settings)
    else:
        raise ConfigError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    _add_listed(tokenizer, settings, folder)
    return tokenizer


def read_chat_template(folder: pathlib.Path) -> str | None:
    """chat_template.jinja, or else tokenizer_config.json's template (of several the default)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
    given = (read_object(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(given, list):
        templates = {each.get("name"): each.get("template") for each in given}
        given = templates.get("default")
    return given if isinstance(given, str) else None


def _read(path: pathlib.Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception, whatever is wrong
        raise ConfigError(f"cannot read {path}: {exc}") from exc


def _from_sentencepiece(folder: pathlib.Path, settings: Fields) -> Tokenizer:
    model = SentencePieceModel.read(folder / "tokenizer.model")
    tokenizer = sentencepiece_bpe(
        model.pieces, model.scores, model.types, add_prefix=model.add_dummy_prefix
    )
    mark_added_tokens(tokenizer, model.pieces, model.types)
    tokens: dict[str, str | None] = {}
    for end, index in (("bos", model.bos_id), ("eos", model.eos_id)):
        own = model.pieces[index] if 0 <= index < len(model.pieces) else None
        token = _text(settings.values.get(f"{end}_token")) or own
        tokens[end] = token if settings.flag(f"add_{end}_token", False) else None
        if tokens[end] is not None and tokenizer.token_to_id(str(token)) is None:
            raise ConfigError(f"{settings.where}: {end}_token = {token!r} is not in the vocabulary")
    add_bos_and_eos(tokenizer, tokens["bos"], tokens["eos"])
    return tokenizer


def _text(token: Any) -> str | None:
    """A token in the settings is a string or an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _add_listed(tokenizer: Tokenizer, settings: Fields, folder: pathlib.Path) -> None:
    """Add the tokens that only the settings list (as `[PAD]` of a fine-tune), in id order."""
    listed: dict[int, AddedToken] = {}
    for text, index in (read_object(folder / "added_tokens.json") or {}).items():
        listed[int(index)] = AddedToken(text, normalized=False)
    for index, token in (settings.values.get("added_tokens_decoder") or {}).items():
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        options = {flag: bool(token[flag]) for flag in flags if flag in token}
        listed[int(index)] = AddedToken(token["content"], **options)
    for index, added in sorted(listed.items()):
        known = tokenizer.token_to_id(added.content)
        if known is None and index != tokenizer.get_vocab_size():
            raise ConfigError(
                f"{settings.where}: the token {added.content!r} is to be {index}, but the "
                f"vocabulary ends at {tokenizer.get_vocab_size()}"
            )
        if known is None or added.content not in _added(tokenizer):
            tokenizer.add_tokens([added])


def _added(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values()}
