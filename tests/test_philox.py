from __future__ import annotations

import numpy as np
import pytest

from llm_serving.agent.philox import philox4x32, uniforms

# Random123's kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(*rows: str) -> np.ndarray:
    return np.array([[int(word, 16) for word in row.split()] for row in rows], np.uint64)


def draw(seed: int, position: int, sample_index: int = 0) -> float:
    arrays = (np.array([seed], np.uint64), np.array([position], np.int32))
    return float(uniforms(*arrays, np.array([sample_index], np.int32))[0])


def test_the_published_answers_come_out_alone_and_side_by_side() -> None:
    counters, keys, answers = (words(*column) for column in zip(*KNOWN_ANSWERS, strict=True))
    assert (philox4x32(counters, keys) == answers).all()
    for i in range(len(answers)):
        assert (philox4x32(counters[[i]], keys[[i]]) == answers[[i]]).all()


def test_the_uniform_is_the_upper_53_bits_of_the_first_two_words() -> None:
    assert draw(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53


def test_both_halves_of_the_seed_and_both_counters_matter() -> None:
    seen = {draw(s, p, i) for s in (0, 1, 2**32, 2**63, 2**64 - 1) for p in (0, 1) for i in (0, 1)}
    assert len(seen) == 20
    assert draw(2**64 - 1, 7, 3) == draw(2**64 - 1, 7, 3)


def test_seed_and_counters_take_the_places_that_the_header_says() -> None:
    output = philox4x32(words("00000007 00000003 0 0"), words("89abcdef 01234567"))[0]
    expected = ((int(output[0]) << 32 | int(output[1])) >> 11) / 2**53
    assert draw(0x0123456789ABCDEF, 7, 3) == expected


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_draws_fill_the_unit_interval_evenly(seed: int) -> None:
    n = 1 << 16
    drawn = uniforms(
        np.full(n, seed, np.uint64), np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    )
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=64, range=(0, 1))
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi_square < 103.4  # 63 degrees of freedom, p = 0.001 (NIST handbook 1.3.6.7.4)


def test_no_rows_no_numbers() -> None:
    assert uniforms(np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int32)).size == 0
