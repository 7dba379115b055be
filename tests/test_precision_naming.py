from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from llm_serving.precision.naming import file_name, key_of, prefix_digest, time_of


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


def test_the_time_is_what_stands_before_the_first_underscore() -> None:
    assert time_of("1722435014.2383034_1.07523.0_100.npy") == 1722435014.2383034
    assert time_of("strange_1.0_100.npy") == 0.0
