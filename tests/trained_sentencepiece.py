"""A SentencePiece model as LLaMA's, only smaller: BPE, byte fallback, spaces kept."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import sentencepiece

_TEXT = (
    "hello world the quick brown fox jumps over lazy dog Beijing love because and of it "
    "123 café naïve don't (see) x=y+1 aaab aab"
)

TEXTS = [
    "hello world",
    " hello world",
    "  hello   there ",
    "I love Beijing, because 123",
    "aaaaab aabaab aaab",
    "café naïve éï",
    "日本語 😀👍🏽",
    "line\nline\t\r\n\n",
    "x" * 50,
    " ",
    "",
]


def train(folder: pathlib.Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Write tokenizer.model into `folder`; the library's own processor for it."""
    draw, words = random.Random(0), _TEXT.split()
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(1000)]
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
