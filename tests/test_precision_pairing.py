"""Pairing as such: whatever the keys, ids and orders, every file has its place."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.precision.folder import Saved
from llm_serving.precision.naming import keys_of
from llm_serving.precision.pairing import may_belong, pair_up

ALIKE = st.lists(st.sampled_from([1, 10, 11, 100, 7523]), min_size=12, max_size=12)


def in_memory(ids: Sequence[int], spelling: int, time_s: int, with_ids: bool) -> Saved:
    keys = keys_of(ids)
    path = pathlib.Path(f"{time_s}_{keys[spelling]}_{len(ids) - 1}.npy")
    if not with_ids:
        return Saved(path, time_s, len(ids) - 1, keys[spelling], keys=(keys[spelling],))
    known = np.array(ids, ">i4").tobytes()
    return Saved(path, time_s, len(ids) - 1, keys[spelling], known, keys)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(ALIKE, *[st.integers(0, 1), st.booleans()] * 2), max_size=8))
def test_the_same_requests_in_the_same_order_find_each_other_however_spelled(
    requests: list[tuple[list[int], int, bool, int, bool]],
) -> None:
    base = [in_memory(r[0], r[1], t, r[2]) for t, r in enumerate(requests)]
    new = [in_memory(r[0], r[3], t, r[4]) for t, r in enumerate(requests)]
    pairing = pair_up(base, new)
    assert (pairing.failed, pairing.alone) == ([], [])
    if len({keys_of(request[0])[0] for request in requests}) == len(requests):
        assert all(pair.base.time == pair.new.time for pair in pairing.pairs)


@settings(derandomize=True, deadline=None)
@given(*[st.lists(st.tuples(ALIKE, st.integers(0, 1), st.booleans()), max_size=8)] * 2)
def test_every_file_is_paired_with_what_it_may_belong_to_or_named(
    ours: list[tuple[list[int], int, bool]], theirs: list[tuple[list[int], int, bool]]
) -> None:
    base = [in_memory(r[0], r[1], t, r[2]) for t, r in enumerate(ours)]
    new = [in_memory(r[0], r[1], t, r[2]) for t, r in enumerate(theirs)]
    pairing = pair_up(base, new)
    assert all(may_belong(pair.base, pair.new) for pair in pairing.pairs)
    lonely = [saved for saved, why in pairing.failed if why == "no partner"]
    assert not any(may_belong(saved, other) for saved in lonely for other in new)
    settled = [pair.base for pair in pairing.pairs] + [saved for saved, _ in pairing.failed]
    assert sorted(settled, key=id) == sorted(base, key=id)
    settled = [pair.new for pair in pairing.pairs] + pairing.alone
    assert sorted(settled, key=id) == sorted(new, key=id)
