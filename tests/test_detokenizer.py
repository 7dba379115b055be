from __future__ import annotations

import itertools
import pathlib
import random
from typing import SupportsIndex, overload

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from llm_serving.server.decoding import byte_alphabet
from llm_serving.server.detokenizer import Detokenizer, decoding_of

SPACE = "\u2581"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u5317\u4eac \u20ac5 caf\u00e9"
LLAMA_STEPS = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
WORDS = ["a", "b", SPACE, SPACE + "the", SPACE * 3, "\u5317", "<0x4", "\ufffd", "\u00e9", "  "]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]


def sentencepiece(decoder: decoders.Decoder | None) -> LibraryTokenizer:
    """Every byte, a few words, three special tokens and one that is added but not special."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(PIECES[:3])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


LLAMA = sentencepiece(decoders.Sequence([*LLAMA_STEPS, decoders.Strip(" ", 1, 0)]))
GEMMA = sentencepiece(decoders.Sequence(LLAMA_STEPS))
DEEP_STRIP = sentencepiece(decoders.Sequence([*LLAMA_STEPS, decoders.Strip(" ", 3, 0)]))
EMPTYING = sentencepiece(  # "b" becomes an empty piece
    decoders.Sequence(
        [
            decoders.Replace(Regex("a+"), "xx"),
            decoders.Replace("b", ""),
            decoders.Sequence(LLAMA_STEPS),
        ]
    )
)
UNKNOWN = [
    sentencepiece(None),
    sentencepiece(decoders.Metaspace()),
    sentencepiece(decoders.WordPiece()),
    sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Replace(SPACE, " ")])),
    sentencepiece(decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Strip(" ", 1, 0)])),
]


def byte_level() -> LibraryTokenizer:
    """Every byte, and added tokens in and out of the alphabet that bytes are spelt in."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("\u5317 x", "\u00e9")])
    return tokenizer


BYTE_LEVEL = byte_level()
KNOWN = [LLAMA, GEMMA, DEEP_STRIP, EMPTYING, BYTE_LEVEL]


def piece_ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def byte_ids(data: bytes) -> list[int]:
    return [PIECES.index(f"<0x{byte:02X}>") for byte in data]


def alphabet_ids(tokenizer: LibraryTokenizer, data: bytes) -> list[int]:
    """The ids of single bytes in a byte-level vocabulary."""
    spelling = {byte: char for char, byte in byte_alphabet().items()}
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[spelling[byte]] for byte in data]


def decoded_text(tokenizer: LibraryTokenizer, prompt: list[int], output: list[int]) -> str:
    """The definition: decode(prompt + output) minus what it shares with decode(prompt)."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + output)
    lengths = range(min(len(before), len(whole)), -1, -1)
    return whole[next(n for n in lengths if before[:n] == whole[:n]) :]


def pieces_of(tokenizer: LibraryTokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """The text that each id of the output brings, and at the end the rest."""
    detokenizer = Detokenizer(decoding_of(tokenizer), prompt)
    return [*map(detokenizer.push, output), detokenizer.flush()]


def check(tokenizer: LibraryTokenizer, prompt: list[int], output: list[int]) -> None:
    text = "".join(pieces_of(tokenizer, prompt, output))
    assert text == decoded_text(tokenizer, prompt, output)


@pytest.fixture(scope="module")
def byte_bpe(smollm2_tokenizer_path: pathlib.Path) -> LibraryTokenizer:
    return LibraryTokenizer.from_file(str(smollm2_tokenizer_path))


@pytest.fixture(scope="module")
def fragments(byte_bpe: LibraryTokenizer) -> list[int]:
    """Ids that are no text on their own: bytes and unfinished characters."""
    ids = range(byte_bpe.get_vocab_size())
    return [i for i in ids if "\ufffd" in byte_bpe.decode([i])]


special_or_byte = st.integers(0, 258)
any_piece = st.integers(0, len(PIECES) + 2)  # and an id or two that do not exist
utf8 = st.text(max_size=3).map(lambda text: byte_ids(text.encode("utf-8", "replace")))
piece_lists = st.lists(
    st.one_of(special_or_byte.map(lambda i: [i]), any_piece.map(lambda i: [i]), utf8), max_size=12
).map(lambda lists: list(itertools.chain(*lists)))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(KNOWN + UNKNOWN), piece_lists, piece_lists)
def test_the_pieces_are_the_decoded_text_with_byte_fallback(
    tokenizer: LibraryTokenizer, prompt: list[int], output: list[int]
) -> None:
    check(tokenizer, prompt, output)


@pytest.mark.parametrize("seed", range(8))
def test_the_pieces_are_the_decoded_text_of_the_default_model(
    byte_bpe: LibraryTokenizer, fragments: list[int], seed: int
) -> None:
    rnd = random.Random(seed)
    whole = list(range(byte_bpe.get_vocab_size() + 10))
    special = list(range(17))
    decoding = decoding_of(byte_bpe)
    for _ in range(300):
        pools = rnd.choice([[whole], [fragments], [fragments, special], [whole, fragments]])
        ids = [rnd.choice(rnd.choice(pools)) for _ in range(rnd.randrange(60))]
        cut = rnd.randint(0, min(len(ids), 20))
        detokenizer = Detokenizer(decoding, ids[:cut])
        text = "".join([*map(detokenizer.push, ids[cut:]), detokenizer.flush()])
        assert text == decoded_text(byte_bpe, ids[:cut], ids[cut:])


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_characters_of_many_bytes_come_whole(byte_bpe: LibraryTokenizer, cut: int) -> None:
    for tokenizer in (byte_bpe, LLAMA):
        ids = tokenizer.encode(FAMILY, add_special_tokens=False).ids
        pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
        assert "".join(pieces) == decoded_text(tokenizer, ids[:cut], ids[cut:])
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_of_byte_level_tokens_comes_as_soon_as_it_is_certain(
    byte_bpe: LibraryTokenizer,
) -> None:
    ids = byte_bpe.encode(FAMILY).ids
    detokenizer, text = Detokenizer(decoding_of(byte_bpe), []), ""
    for n, token_id in enumerate(ids, 1):
        text += detokenizer.push(token_id)
        so_far = byte_bpe.decode(ids[:n])
        assert text == so_far.rstrip("\ufffd")
        assert detokenizer.is_holding() == so_far.endswith("\ufffd")


def test_a_later_byte_decides_about_a_run_of_bytes() -> None:
    euro = byte_ids("€".encode())
    assert pieces_of(LLAMA, piece_ids("a"), [*euro, *piece_ids("b")]) == ["", "", "", "€b", ""]
    assert pieces_of(LLAMA, piece_ids("a"), [*euro, *byte_ids(b"\xff\xff")]) == [
        *("", "", ""),
        "\ufffd" * 4,
        "\ufffd",
        "",
    ]
    assert pieces_of(LLAMA, piece_ids("a"), euro[:2]) == ["", "", "\ufffd\ufffd"]


def test_a_ruined_run_ends_with_the_next_piece() -> None:
    run = byte_ids("é".encode() + b"\xff")
    after = [*piece_ids("b"), *byte_ids("é".encode())]
    assert pieces_of(LLAMA, piece_ids("a"), run + after)[2:] == ["\ufffd" * 3, "b", "", "", "é"]


def test_only_the_first_space_of_the_whole_text_is_stripped() -> None:
    the = piece_ids(SPACE + "the")
    assert "".join(pieces_of(LLAMA, piece_ids("<s>"), the + the)) == "the the"
    assert "".join(pieces_of(LLAMA, piece_ids("<s>", "a"), the + the)) == " the the"
    assert "".join(pieces_of(GEMMA, piece_ids("<s>"), the + the)) == " the the"


def test_spaces_that_are_bytes_are_stripped_as_any_other() -> None:
    assert pieces_of(LLAMA, [], byte_ids(b"  ")) == ["", "", " "]
    assert pieces_of(LLAMA, [], [*byte_ids(b" "), *piece_ids("a")]) == ["", "a", ""]


def test_nothing_is_stripped_after_a_prompt_that_ends_with_spaces() -> None:
    prompt, output = piece_ids("a", SPACE), piece_ids(SPACE * 3, "b")
    assert "".join(pieces_of(DEEP_STRIP, prompt, output)) == "   b"


def test_an_added_token_is_its_own_text_where_the_alphabet_cannot_spell_it() -> None:
    ids = BYTE_LEVEL.encode("a\u5317 xb\u00e9").ids
    assert len(ids) == 4
    assert "".join(pieces_of(BYTE_LEVEL, [], ids)) == BYTE_LEVEL.decode(ids) == "a\u5317 xb\ufffd"


def test_special_tokens_part_neither_characters_nor_runs(byte_bpe: LibraryTokenizer) -> None:
    first, second = byte_ids("é".encode())
    special = PIECES.index("</s>")
    assert pieces_of(LLAMA, [], [first, special, second]) == ["", "", "", "é"]
    first, second = alphabet_ids(byte_bpe, "é".encode())
    assert pieces_of(byte_bpe, [], [first, 2, second]) == ["", "", "é", ""]


def test_a_prompt_that_ends_inside_a_character_leaves_it_to_the_output(
    byte_bpe: LibraryTokenizer,
) -> None:
    ids = alphabet_ids(byte_bpe, "€".encode())
    assert byte_bpe.decode(ids) == "€"
    exclamation = byte_bpe.encode("!").ids
    assert pieces_of(byte_bpe, ids[:2], [ids[2], *exclamation]) == ["€", "!", ""]
    assert pieces_of(byte_bpe, ids[:2], exclamation) == ["!", ""]  # its U+FFFD is the prompt's
    euro = byte_ids("€".encode())
    assert pieces_of(LLAMA, euro[:2], [euro[2], *piece_ids("a")]) == ["", "€a", ""]
    assert pieces_of(LLAMA, euro[:2], piece_ids("a")) == ["a", ""]
    assert pieces_of(LLAMA, euro, byte_ids(b"\xff")) == ["\ufffd" * 4, ""]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_long_prompt_may_end_anywhere_inside_a_character(cut: int) -> None:
    face = "\U0001f600".encode()
    for tokenizer, before, ids in (
        (BYTE_LEVEL, alphabet_ids(BYTE_LEVEL, b"hello "), alphabet_ids(BYTE_LEVEL, face)),
        (LLAMA, piece_ids("a", "b", "a"), byte_ids(face)),
    ):
        pieces = pieces_of(tokenizer, [*before, *ids[:cut]], ids[cut:])
        assert "".join(pieces) == "\U0001f600"


def test_what_the_prompt_had_is_compared_to_its_end() -> None:
    # EF BF BD is U+FFFD itself, and two of them are what the prompt's half of it looked like.
    output = [*byte_ids(b"\xbd"), *piece_ids("b", "\ufffd", "a")]
    assert "".join(pieces_of(EMPTYING, byte_ids(b"\xef\xbf"), output)) == "xx"


@pytest.mark.parametrize("tokenizer", UNKNOWN)
def test_an_unknown_decoder_gives_all_its_text_at_the_end(tokenizer: LibraryTokenizer) -> None:
    ids = piece_ids("a", SPACE + "the", SPACE, "b")
    *before, last = pieces_of(tokenizer, ids, ids)
    assert before == [""] * 4
    assert last == decoded_text(tokenizer, ids, ids) != ""


def test_a_long_prompt_costs_no_more_than_its_end(byte_bpe: LibraryTokenizer) -> None:
    class Counted(list[int]):
        num_read = 0

        @overload
        def __getitem__(self, at: SupportsIndex) -> int: ...
        @overload
        def __getitem__(self, at: slice) -> list[int]: ...
        def __getitem__(self, at: SupportsIndex | slice) -> int | list[int]:
            read = super().__getitem__(at)
            Counted.num_read += len(read) if isinstance(read, list) else 1
            return read

    for tokenizer in (byte_bpe, LLAMA):
        prompt = Counted(tokenizer.encode("b" * 1000 + "\u20ac", add_special_tokens=False).ids * 50)
        Counted.num_read = 0
        Detokenizer(decoding_of(tokenizer), prompt)
        assert Counted.num_read < 20
