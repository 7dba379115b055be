from __future__ import annotations

import pathlib

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders

from llm_serving.errors import ConfigError
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.testing import VOCAB_SIZE
from tests.tiny_tokenizer import BOS, EOS, PIECES, SPACE, make_tiny_tokenizer, tiny_tokenizer_path


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_path(tmp_path))


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def test_bos_is_added_only_if_the_file_says_so(tmp_path: pathlib.Path, tiny: Tokenizer) -> None:
    assert tiny.encode("a") == ids(SPACE + "a")
    with_bos = Tokenizer(tiny_tokenizer_path(tmp_path, add_bos=True))
    assert with_bos.encode("a") == [BOS, *ids(SPACE + "a")]


def test_special_tokens_are_recognised(tiny: Tokenizer) -> None:
    assert tiny.encode("b<eos>") == [*ids(SPACE, "b"), EOS]


def test_encodes_as_the_library_does(smollm2_tokenizer_path: pathlib.Path) -> None:
    smollm2 = Tokenizer(smollm2_tokenizer_path)
    library = LibraryTokenizer.from_file(str(smollm2_tokenizer_path))
    for text in ("", " I love Beijing, because", "1234 <|im_end|> x", "\U0001f469\u200d\U0001f4bb"):
        assert smollm2.encode(text) == library.encode(text).ids


def test_spans_are_the_characters_of_each_id(smollm2_tokenizer_path: pathlib.Path) -> None:
    smollm2 = Tokenizer(smollm2_tokenizer_path)
    text = "<|im_start|>caf\u00e9 1 \u5317"
    spans = smollm2.spans(text)
    assert [token_id for token_id, _, _ in spans] == smollm2.encode(text)
    assert text[spans[0][1] : spans[0][2]] == "<|im_start|>"
    assert {i for _, start, stop in spans for i in range(start, stop)} == set(range(len(text)))


def test_special_tokens_are_skipped_or_shown(tiny: Tokenizer) -> None:
    assert tiny.decode([BOS, *ids("h", "i"), EOS]) == "hi"
    assert tiny.decode([BOS, *ids("h", "i"), EOS], skip_special=False) == "<s>hi<eos>"


@pytest.mark.parametrize(
    ("piece", "text"), [("the", "the"), (SPACE + "a", " a"), ("<0xE2>", "\ufffd"), ("<eos>", "")]
)
def test_one_id_has_a_text_of_its_own(tiny: Tokenizer, piece: str, text: str) -> None:
    assert tiny.token_text(PIECES.index(piece)) == text


def test_an_id_outside_the_vocabulary_has_no_text(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == VOCAB_SIZE
    assert tiny.token_text(VOCAB_SIZE) == ""
    assert not tiny.is_special(VOCAB_SIZE)


def test_truncation_and_padding_in_the_file_change_nothing(tmp_path: pathlib.Path) -> None:
    library = make_tiny_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "cut.json"))
    assert Tokenizer(tmp_path / "cut.json").encode("bcd") == ids(SPACE, "b", "c", "d")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer(path)


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_decoder_that_strips_the_end_is_refused(tmp_path: pathlib.Path, is_nested: bool) -> None:
    # the library panics where nothing is left to strip, and a panic ends more than one request
    library = make_tiny_tokenizer()
    strip = decoders.Strip(" ", 0, 1)
    library.decoder = decoders.Sequence([decoders.Fuse(), strip]) if is_nested else strip
    library.save(str(tmp_path / "strip.json"))
    with pytest.raises(ConfigError, match=r"strip\.json: its decoder has a Strip .*stop 1.* 0"):
        Tokenizer(tmp_path / "strip.json")
