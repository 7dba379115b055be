"""Which requests and runs `verify-determinism` compares, and what counts as a difference."""

from __future__ import annotations

import pytest

from llm_serving.determinism.scenarios import make_prompts, plain_first, scenarios
from llm_serving.determinism.seen import Digests


def test_what_is_missing_or_contradicts_itself_differs() -> None:
    expected, found = Digests(), Digests()
    for key, position in ((b"a", 7), (b"b", 3), (b"c", 5)):
        expected.add(key, b"x", position)
    assert expected.differing(expected) == []
    found.add(b"a", b"x", 7)
    found.add(b"b", b"y", 3)
    found.add(b"a", b"z", 7)
    assert found.differing(expected) == [3, 5, 7]


def test_prompts_share_beginnings_and_half_of_them_are_sampled() -> None:
    prompts = make_prompts(12, 4, 100, 512, seed=0)
    assert [prompt.sampling.temperature > 0 for prompt in prompts] == [False, True] * 6
    assert [prompt.sampling.top_k for prompt in prompts if prompt.sampling.temperature] == [
        50,
        0,
    ] * 3
    assert [prompt.sampling.num_logprobs for prompt in prompts] == [0, 0, 0, 0, 3] * 2 + [0, 0]
    assert [i for i, prompt in enumerate(prompts) if prompt.is_plain] == [0, 2, 6, 8, 10]
    shared = sum(
        a.ids[: min(len(a.ids), len(b.ids)) - 1] == b.ids[: min(len(a.ids), len(b.ids)) - 1]
        for i, a in enumerate(prompts)
        for b in prompts[:i]
        if min(len(a.ids), len(b.ids)) > 16
    )
    assert shared >= 1
    alone, others = scenarios(prompts, 4, 2)
    assert alone.limits.max_num_seqs == 1
    assert {scenario.num_threads for scenario in others} == {1, 2, 3}


@pytest.mark.parametrize(("longest", "is_long"), [(513, False), (514, True)])
def test_long_contexts_are_forced_where_the_model_has_them(longest: int, is_long: bool) -> None:
    prompts = make_prompts(6, 4, 100, longest, seed=0)
    assert max(len(prompt.ids) for prompt in prompts) == longest - 4
    alone, others = scenarios(prompts, 4, 2)
    assert {"long_contexts" in each.forced for each in (alone, *others)} == {is_long}


def test_plain_prompts_are_there_before_the_others() -> None:
    prompts = make_prompts(24, 16, 100, 512, seed=0)
    served = plain_first(prompts, 16)
    assert [prompt.ids for prompt in served] == [prompt.ids for prompt in prompts]
    plain = [prompt.arrives for prompt in served if prompt.is_plain]
    assert max(plain) < 16 <= min(prompt.arrives for prompt in served if not prompt.is_plain)
    assert len(set(plain)) > 3  # as many different numbers of rows
