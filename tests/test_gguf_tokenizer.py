"""The tokenizer of a GGUF file, judged by the ids it gives."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits
from transformers import AutoTokenizer

from llm_serving.errors import ConfigError
from llm_serving.prepare.gguf_file import GgufFile
from llm_serving.prepare.gguf_tokenizer import bos_and_eos_ids, build_gguf_tokenizer
from llm_serving.prepare.pre_tokenizers import find_pre_tokenizer
from tests.tiny_gguf import END, THINK, TOKENS, TYPES, from_hf, metadata, random_tensors, write_gguf
from tests.trained_sentencepiece import TEXTS, train

# ---- the default model ----

PLAIN_TEXTS = [
    " I love Beijing, because",
    "I love Beijing",
    "  two  spaces  and a tab\tand\r\nlines\n\n\n",
    "don't DON'T we'll",
    "日本語テスト 中文 한국어",
    "😀👍🏽 café naïve",
    "def f(x):\n    return x + 1\n",
    "",
    " ",
]


@pytest.fixture(scope="module")
def own(smollm2: pathlib.Path) -> Tokenizer:
    return build_gguf_tokenizer(GgufFile(smollm2))


@pytest.fixture(scope="module")
def independent(smollm2: pathlib.Path) -> Tokenizer:
    """The pipeline that SmolLM2 was published with, around the file's vocabulary and merges."""
    meta = GgufFile(smollm2).metadata
    vocabulary = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        t for t, k in zip(vocabulary, meta["tokenizer.ggml.token_type"], strict=True) if k == 3
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def test_digits_stand_apart_and_no_bos_is_added(own: Tokenizer) -> None:
    assert own.encode("2024 and ½").tokens == ["2", "0", "2", "4", "Ġand", "Ġ", "Â½"]
    assert own.encode(" I love Beijing, because").ids == [339, 2606, 18921, 28, 975]


def test_special_tokens_in_the_text_are_recognised(own: Tokenizer) -> None:
    ids = own.encode("<|im_start|>user\nhi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert own.decode(ids) == "user\nhi"
    assert own.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text() | st.text("0123456789½²Ⅷ ab\n'. é日😀<|im_end>"))
def test_ids_are_those_of_the_published_pipeline(
    own: Tokenizer, independent: Tokenizer, text: str
) -> None:
    assert own.encode(text).ids == independent.encode(text).ids
    assert own.decode(own.encode(text).ids) == independent.decode(independent.encode(text).ids)


def test_transformers_agrees_where_no_digit_is_near(own: Tokenizer, smollm2: pathlib.Path) -> None:
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in PLAIN_TEXTS:
        assert own.encode(text).ids == reference(text)["input_ids"], text


# ---- byte-level vocabularies ----


def tokenizer(folder: pathlib.Path, **keys: Any) -> Tokenizer:
    meta = metadata() | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return build_gguf_tokenizer(GgufFile(write_gguf(folder / "t.gguf", {}, meta)))


def test_merges_apply_and_marked_tokens_are_whole(tmp_path: pathlib.Path) -> None:
    own = tokenizer(tmp_path)
    encoding = own.encode("in the<think>end<|end|>")
    assert encoding.tokens == ["i", "n", "Ġthe", "<think>", "e", "n", "d", "<|end|>"]
    assert own.decode(encoding.ids) == "in the<think>end"  # user-defined stays, control goes


@pytest.mark.parametrize(
    ("keys", "added"),
    [
        ({}, (False, False)),
        ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"pre": "llama-bpe"}, (True, False)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (False, False)),
        ({"pre": "qwen2"}, (False, False)),
    ],
)
def test_bos_and_eos_only_if_the_file_or_its_family_says_so(
    tmp_path: pathlib.Path, keys: dict[str, Any], added: tuple[bool, bool]
) -> None:
    ids = tokenizer(tmp_path, bos_token_id=THINK, **keys).encode("a").ids
    assert (ids[0] == THINK, ids[-1] == END) == added
    assert ids.count(TOKENS.index("a")) == 1


def test_a_word_that_is_a_token_is_taken_whole_where_the_family_says_so(
    tmp_path: pathlib.Path,
) -> None:
    keys = {"merges": ["h e"], "add_bos_token": False}  # nothing leads to "Ġthe"
    assert tokenizer(tmp_path, pre="llama-bpe", **keys).encode(" the").tokens == ["Ġthe"]
    assert tokenizer(tmp_path, pre="smaug-bpe", **keys).encode(" the").tokens == ["Ġ", "t", "he"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["It", "'", "S", "Ġ1234", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("smollm", ["It", "'", "S", "Ġ", "1", "2", "3", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("llama-bpe", ["It", "'S", "Ġ", "123", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("qwen2", ["It", "'S", "Ġ", "1", "2", "3", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("tekken", ["It", "'S", "Ġ", "1", "2", "3", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("gpt-4o", ["It'S", "Ġ", "123", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("deepseek-v3", ["It", "'S", "Ġ", "123", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("deepseek-coder", ["It", "'", "S", "Ġ", "1", "2", "3", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("falcon", ["It", "'", "S", "Ġ", "123", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
        ("default", ["It", "'", "S", "Ġ", "123", "4", "Ġé", "Ġ", "Ġx", "Ċ"]),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(name: str, words: list[str]) -> None:
    found = find_pre_tokenizer(name).build().pre_tokenize_str("It'S 1234 é  x\n")
    decode = decoders.ByteLevel().decode
    assert "".join(decode([word]) for word, _ in found) == "It'S 1234 é  x\n"
    assert [word.replace("Ã©", "é") for word, _ in found] == words


def test_an_empty_token_keeps_its_id_and_is_never_found(tmp_path: pathlib.Path) -> None:
    own = tokenizer(tmp_path, tokens=[*TOKENS, ""], token_type=[*TYPES, 3])
    assert own.get_vocab_size() == len(TOKENS) + 1
    assert len(TOKENS) not in own.encode(f"a[EMPTY_{len(TOKENS)}]").ids


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.ggml.pre = 'kimi-k2' is not supported"):
        tokenizer(tmp_path, pre="kimi-k2")


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"model": "bert"}, "model = 'bert' is not supported, gpt2 or llama is"),
        ({"tokens": None}, "has no tokens"),
        ({"merges": None}, "has no merges"),
        ({"merges": ["t q"]}, "the merge of 't' and 'q' is not in the vocabulary"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "the token 'a' is there twice"),
        ({"token_type": [1, 1]}, "has no token_type for each of its 261 tokens"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id = None is to be added"),
    ],
)
def test_a_tokenizer_that_can_not_be_rebuilt_is_refused(
    tmp_path: pathlib.Path, keys: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tokenizer(tmp_path, **keys)


def test_every_token_that_ends_a_turn_is_an_eos(tmp_path: pathlib.Path) -> None:
    meta = metadata() | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": END}
    path = write_gguf(tmp_path / "t.gguf", from_hf(random_tensors()), meta)
    assert bos_and_eos_ids(GgufFile(path)) == (END, [END, 7])


# ---- SentencePiece vocabularies ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    return train(tmp_path_factory.mktemp("sentencepiece"))


def sentencepiece_gguf(
    folder: pathlib.Path, model: sentencepiece.SentencePieceProcessor, **keys: Any
) -> Tokenizer:
    size = model.get_piece_size()
    kinds = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte}
    types = [next((k for k, test in kinds.items() if test(i)), 1) for i in range(size)]
    return tokenizer(
        folder,
        model="llama",
        pre="default",
        merges=None,
        tokens=[model.id_to_piece(i) for i in range(size)],
        scores=[float(model.get_score(i)) for i in range(size)],
        token_type=types,
        bos_token_id=1,
        eos_token_id=2,
        **keys,
    )


def test_a_llama_vocabulary_gives_the_ids_of_sentencepiece(
    tmp_path: pathlib.Path, trained: sentencepiece.SentencePieceProcessor
) -> None:
    own = sentencepiece_gguf(tmp_path, trained)
    for text in TEXTS:
        assert own.encode(text).ids == [1, *trained.encode(text)], text
        assert own.decode(own.encode(text).ids) == text


def test_special_tokens_of_a_llama_vocabulary_are_recognised(
    tmp_path: pathlib.Path, trained: sentencepiece.SentencePieceProcessor
) -> None:
    own = sentencepiece_gguf(tmp_path, trained, add_bos_token=False)
    hello = trained.encode("hello")
    assert own.encode("hello</s>hello").ids == [*hello, 2, *hello]


def test_no_space_in_front_if_the_file_says_so(
    tmp_path: pathlib.Path, trained: sentencepiece.SentencePieceProcessor
) -> None:
    own = sentencepiece_gguf(tmp_path, trained, add_bos_token=False, add_space_prefix=False)
    assert own.encode(" hello").ids == trained.encode("hello")
    assert "".join(own.encode("hello").tokens) == "hello"
