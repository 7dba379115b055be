"""How is a `tokenizers` pipeline built from a bare vocabulary?

Two kinds: byte-level BPE (GPT-2 and everything after it) and SentencePiece BPE with byte fallback
(LLaMA, Llama 2, Mistral).  Both GGUF files and tokenizer.model files end here, so that the same
vocabulary gives the same ids wherever it came from.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from llm_serving.errors import ConfigError
from llm_serving.prepare.sentencepiece_file import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

__all__ = ["add_bos_and_eos", "byte_level_bpe", "mark_added_tokens", "sentencepiece_bpe"]

_SPACE = "▁"


def byte_level_bpe(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    ignore_merges: bool,
) -> Tokenizer:
    """`pre_tokenizer` splits the text and maps its bytes to the alphabet of the vocabulary.

    ignore_merges: a word that is in the vocabulary is taken whole, whatever the merges say.
    """
    for left, right in merges:
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise ConfigError(f"the merge of {left!r} and {right!r} is not in the vocabulary")
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_prefix: bool,
) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that make a piece, the best score merges first.

    Every space becomes U+2581, and with `add_prefix` every stretch of text between special tokens
    begins with one more, as in llama.cpp and in the tokenizer.json that Llama 2 was published with.
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    unknown = next(
        (piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None
    )
    merges = _merges(pieces, scores, types)
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend(_SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence([*decoding, *strip])
    return tokenizer


def mark_added_tokens(tokenizer: Tokenizer, pieces: Sequence[str], types: Sequence[int]) -> None:
    """Recognise control, unknown and user-defined pieces in the text, as they are written.

    The first two are special: they are left out of decoded text.
    """
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=special[kind], normalized=False)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in special and piece
        ]
    )


def add_bos_and_eos(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put `bos` in front of and `eos` behind every text; None: nothing."""
    tokens = [token for token in (bos, eos) if token is not None]
    if not tokens:
        return
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(tokens)]
    single = " ".join(
        f"{token}:0" if token else "$A:0" for token in (bos, "", eos) if token is not None
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=ids
    )


def _merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to make a normal piece of two others, best score first."""
    known = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind == NORMAL
    }
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(known, key=lambda piece: -known[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
