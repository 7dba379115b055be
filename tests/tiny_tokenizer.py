"""A tokenizer for the vocabulary of `llm_serving.testing`: 50 ids, Llama-2's way of doing things.

    0 .. 2      <unk> <s> <eos>, special
    3 .. 11     byte pieces, enough for a euro sign, an e with acute accent and a grinning face
    12 .. 49    the space, letters, digits, signs, and three pieces of several letters

Spaces become U+2581 and one is put in front; characters without a piece fall back to their
bytes, or to <unk> where a byte is missing.
"""

from __future__ import annotations

import pathlib

from tokenizers import Tokenizer, decoders, models, normalizers, processors

UNK, BOS, EOS = 0, 1, 2
SPACE = "\u2581"
SPECIALS = ["<unk>", "<s>", "<eos>"]
BYTES = [f"<0x{byte:02X}>" for byte in "€é😀".encode()]
SIGNS = [*"abcdefghijklmnopqrstuvwxyz", *"01.,!<>\n"]
MERGES = [("t", "h"), ("th", "e"), (SPACE, "a")]
PIECES = [*SPECIALS, *BYTES, SPACE, *SIGNS, *("".join(pair) for pair in MERGES)]


def make_tiny_tokenizer(*, add_bos: bool = False) -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    model = models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def tiny_tokenizer_path(folder: pathlib.Path, *, add_bos: bool = False) -> pathlib.Path:
    """The same as a tokenizer.json in `folder`."""
    path = folder / "tokenizer.json"
    make_tiny_tokenizer(add_bos=add_bos).save(str(path))
    return path
