"""Into which words is a text split before byte-level merging?  `tokenizer.ggml.pre` names it.

GGUF files hold vocabulary and merges, but of the splitting only a name.  What the names mean is
defined by llama.cpp's src/llama-vocab.cpp; where that file keeps the expression of the model's own
tokenizer.json in a comment beside its adaptation, the original is used.  Each expression is
applied to what the one before it left: matches and the text between them become words.
"""

from __future__ import annotations

import msgspec
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.pre_tokenizers import PreTokenizer as Pipeline

from llm_serving.errors import ConfigError

__all__ = ["PreTokenizer", "find_pre_tokenizer"]


class PreTokenizer(msgspec.Struct, frozen=True):
    expressions: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say

    def build(self) -> Pipeline:
        splits: list[Pipeline] = [Split(Regex(text), "isolated") for text in self.expressions]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_TAIL
_GPT4O = _CASED % (_ENGLISH + "?", _ENGLISH + "?") + r"|\p{N}{1,3}" + _CASED_TAIL
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_KINDS = [
    (PreTokenizer((_GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion a.x-4.0 mellum exaone4 gigachat"),
    (
        PreTokenizer((r"\p{N}", _GPT2)),  # digits apart
        "smollm starcoder refact command-r codeshell exaone minerva-7b",
    ),
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 lfm2",
    ),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (PreTokenizer((_QWEN2,)), "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan grok-2"),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2"),
    (PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)), "deepseek-v3 hunyuan-dense"),
    (
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        "deepseek-coder",
    ),
    (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "falcon",
    ),
    (
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "default",
    ),
]
_TABLE = {name: kind for kind, names in _KINDS for name in names.split()}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """Raises ConfigError for a name that is not in the table: a guess would change every id."""
    if name not in _TABLE:
        known = ", ".join(sorted(_TABLE))
        raise ConfigError(f"tokenizer.ggml.pre = {name!r} is not supported; supported: {known}")
    return _TABLE[name]
