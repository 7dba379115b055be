"""The filters against transformers' warpers, whose sort is made stable to settle its ties."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llm_serving.agent.filters import is_filtered, narrow, to_weights
from llm_serving.agent.scratch import Scratch
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams

torch.set_num_threads(1)

NO_IDS = torch.zeros(1, 0, dtype=torch.int64)


@pytest.fixture(autouse=True, scope="module")
def stable_sort() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
        yield


def records(*params: SamplingParams) -> np.ndarray:
    return np.frombuffer(b"".join(p.record() for p in params), SAMPLING_DTYPE)


def filtered(logits: torch.Tensor, *params: SamplingParams) -> torch.Tensor:
    scores = logits / torch.tensor([[p.temperature] for p in params])
    narrow(scores, records(*params), Scratch())
    return scores


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        chain.append(TypicalLogitsWarper(params.typical_p))
    apply: Callable[..., torch.Tensor] = chain
    return apply(NO_IDS, logits)


def make_logits(kind: str, width: int, seed: int) -> torch.Tensor:
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    masked = noise * 3
    masked[:, 1::3] = -torch.inf
    peaked = noise.clone()
    peaked[:, seed % width] = 25
    return {
        "random": noise * 3,
        "mild": noise * 0.3,
        "flat": torch.zeros(1, width),
        "peaked": peaked,
        "tied": (noise * 2).round(),
        "bfloat16": (noise * 4 + 8).bfloat16().float(),
        "masked": masked,
    }[kind]


KINDS = ["random", "mild", "flat", "peaked", "tied", "bfloat16", "masked"]
shares = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 4000]),
    top_p=st.one_of(st.just(1.0), shares),
    min_p=st.one_of(st.just(0.0), st.just(1.0), shares),
    typical_p=st.one_of(st.just(1.0), shares),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.sampled_from([2, 5, 37, 300, 2048]), st.integers(0, 99), sampling)
def test_the_kept_tokens_are_those_of_transformers(
    kind: str, width: int, seed: int, params: SamplingParams
) -> None:
    logits = make_logits(kind, width, seed)
    ours, theirs = filtered(logits, params), warped(logits, params)
    assert (ours.isfinite() == theirs.isfinite()).all()
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-7)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(0, 99), st.sampled_from(["top_p", "typical_p"]), shares)
def test_one_mass_filter_alone_keeps_what_transformers_keeps(
    kind: str, seed: int, name: str, share: float
) -> None:
    option: dict[str, Any] = {name: share}
    params = SamplingParams(temperature=1.0, **option)
    logits = make_logits(kind, 3000, seed)
    ours, theirs = filtered(logits, params), warped(logits, params)
    assert (ours.isfinite() == theirs.isfinite()).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), sampling), min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_rows_of_any_parameters_share_a_batch_and_do_not_notice(
    rows: list[tuple[str, SamplingParams]], seed: int
) -> None:
    logits = torch.cat([make_logits(kind, 301, seed + i) for i, (kind, _) in enumerate(rows)])
    params = [p for _, p in rows]
    together = filtered(logits, *params)
    alone = [filtered(logits[[i]], p) for i, p in enumerate(params)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("top_p", "num_kept"), [(0.05, 1), (0.1, 1), (0.6, 6), (0.61, 7), (0.9, 9), (0.999, 10)]
)
def test_top_p_of_a_flat_row_counts_exactly_and_keeps_the_highest_ids(
    top_p: float, num_kept: int
) -> None:
    kept = filtered(torch.zeros(1, 10), SamplingParams(temperature=1.0, top_p=top_p)).isfinite()
    assert kept[0].nonzero().view(-1).tolist() == list(range(10 - num_kept, 10))


def test_typical_p_that_is_reached_exactly_needs_no_further_token() -> None:
    logits = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log()  # nearest to the entropy: 1/4, 1/2, 1/8
    for typical_p, num_kept in ((0.25, 1), (0.75, 2), (0.76, 4)):
        params = SamplingParams(temperature=1.0, typical_p=typical_p)
        assert filtered(logits, params).isfinite().sum() == num_kept
        assert warped(logits, params).isfinite().sum() == num_kept


def test_top_k_keeps_all_that_equal_the_last() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = filtered(logits, SamplingParams(temperature=1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiny", [{"top_p": 1e-30}, {"typical_p": 1e-30}, {"min_p": 1.0}])
def test_something_is_always_left(kind: str, tiny: dict[str, Any]) -> None:
    logits = make_logits(kind, 40, 1)
    assert filtered(logits, SamplingParams(temperature=1.0, **tiny)).isfinite().any()


def test_a_row_with_logits_far_apart_is_filtered_beyond_the_last_bucket() -> None:
    logits = torch.tensor([[0.0, -40.0, -50.0, -45.0, -60.0, -torch.inf]])
    kept = filtered(logits, SamplingParams(temperature=1.0, top_k=3)).isfinite()
    assert kept.tolist() == [[True, True, False, True, False, False]]


def test_which_records_use_a_filter() -> None:
    used: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}, {"typical_p": 0.5}]
    params = [SamplingParams(temperature=0.5, repetition_penalty=2.0)]
    params += [SamplingParams(**u) for u in used]
    assert is_filtered(records(*params)).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_whole_numbers_whose_sums_are_exact_in_any_order(kind: str) -> None:
    weights = to_weights(make_logits(kind, 50000, 3), Scratch())[0]
    total = sum(int(w) for w in weights.tolist())
    assert weights.sum().item() == total
    assert weights.flip(0).cumsum(0)[-1].item() == total
    assert abs(total / 2**50 - 1) < 1e-4
