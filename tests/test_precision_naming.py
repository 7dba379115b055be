from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.precision.naming import (
    FileName,
    digits_of,
    file_name,
    key_of,
    keys_match,
    keys_of,
    prefix_digest,
    read_name,
)

WILD = [1, 7523, 278, 1494, 14880, 322]  # the ids behind the two keys that users know
WHOLE, FLOATS = "17523278149414880322", "1.07523.0278.01494.0"
IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=30)


def test_a_file_is_called_as_users_know_it() -> None:
    key = key_of(np.array([1, 7523, 278, 1494, 14880], np.int32))
    assert file_name(1722435014.2383034, key, 100) == (
        "1722435014.2383034_1.07523.0278.01494.0_100.npy"
    )


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        ([7], "7.0"),
        ([1, 2], "1.02.0"),
        ([0, 10, 0], "0.010.00.0"),
        ([99999] * 3, "99999.099999.099999."),
        ([1] * 200, "1.01.01.01.01.01.01."),
    ],
)
def test_a_key_is_the_first_20_characters_of_the_ids_as_floats(ids: list[int], key: str) -> None:
    assert key_of(np.array(ids, np.int32)) == key


def test_a_digest_names_every_id_in_its_place() -> None:
    ids = np.array([1, 2, 300, 70000], np.int32)
    assert prefix_digest(ids) == hashlib.sha256(struct.pack("<4i", *ids.tolist())).hexdigest()
    assert prefix_digest(ids[::2]) == prefix_digest(np.array([1, 300], np.int32))
    assert len({prefix_digest(each) for each in (ids, ids[:3], ids[::-1])}) == 3


def test_a_name_says_time_key_and_position() -> None:
    named = read_name("1722435014.2383034_1.07523.0_100.npy")
    assert named == FileName(1722435014.2383034, "1.07523.0", 100)
    for other in ("strange_1.0_100.npy", "1.5_1.0_100.npy.bak", "1.5_1.0_-1.npy", "1.5_x_1.npy"):
        assert read_name(other) is None


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(IDS)
def test_both_spellings_of_the_same_ids_match(ids: list[int]) -> None:
    whole, floats = keys_of(ids)
    assert keys_match(whole, floats)
    assert keys_match(floats, whole)
    assert keys_match(whole, whole)
    assert len(whole) <= 20
    assert len(floats) <= 20
    assert floats == key_of(np.array(ids, np.int32))  # as the server names them


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(IDS, IDS)
def test_a_float_key_matches_only_ids_that_begin_with_its_digits(
    ids: list[int], others: list[int]
) -> None:
    """Told from the full texts, without the rules of normalising."""
    _, floats = keys_of(ids)
    whole, _ = keys_of(others)
    complete = "".join(f"{i}.0" for i in ids)
    seen = "".join(map(str, ids)) if len(complete) < 20 else _digits_within(ids)
    expected = whole == seen[:20] if len(complete) < 20 else whole.startswith(seen)
    assert keys_match(floats, whole) == expected


def _digits_within(ids: Sequence[int]) -> str:
    """The digits of the ids themselves among the first 20 characters of the float spelling."""
    characters = []
    for i in ids:
        characters += [(c, True) for c in str(i)] + [(".", False), ("0", False)]
    return "".join(c for c, is_digit in characters[:20] if is_digit)


@pytest.mark.parametrize(
    ("floats", "digits"),
    [
        ("1.07523.0278.01494.0", "175232781494"),
        ("1.0.", "1"),
        ("10.07.0", "107"),
        ("0.00.01.0", "001"),
        ("1.014880.0", "114880"),
        ("1.014880.", "114880"),
        ("1.0148", "1148"),
    ],
)
def test_a_float_key_says_these_digits(floats: str, digits: str) -> None:
    assert digits_of(floats) == digits


def test_the_two_keys_that_users_know_belong_together() -> None:
    assert keys_of(WILD) == (WHOLE, FLOATS)
    assert keys_match(WHOLE, FLOATS)
    assert not keys_match("17523278149514880322", FLOATS)
    assert not keys_match("12", "123")
    assert not keys_match("1.02.0", "123")
