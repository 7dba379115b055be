from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from llm_serving.agent.logits import adjust
from llm_serving.errors import ChannelError
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs

torch.set_num_threads(1)

WIDTH = 12
OFF = SamplingParams()

Said = tuple[list[int], list[int]]  # prompt and output


def step(
    params: list[SamplingParams], said: list[Said], *, sources: list[int] | None = None
) -> StepInputs:
    histories = [p + o if s.has_penalties else [] for s, (p, o) in zip(params, said, strict=True)]
    biases = [(i, *bias) for i, p in enumerate(params) for bias in p.logit_bias]
    nothing, places = np.zeros(0, np.int32), np.arange(len(params), dtype=np.int32)
    return StepInputs(
        step_id=2,
        input_ids=places,
        positions=places,
        slots=nothing,
        query_starts=np.arange(len(params) + 1, dtype=np.int32),
        context_lens=nothing,
        block_tables=nothing.reshape(0, 1),
        sources=np.array(sources or [-1] * len(params), np.int32),
        adapter_ids=nothing,
        logit_positions=places,
        sampling=np.frombuffer(b"".join(p.record() for p in params), SAMPLING_DTYPE),
        history_starts=np.cumsum([0, *map(len, histories)]).astype(np.int32),
        history_ids=np.array([token for ids in histories for token in ids], np.int32),
        history_prompt_lens=np.array([len(p) for p, _ in said], np.int32),
        bias_rows=np.array([b[0] for b in biases], np.int32),
        bias_ids=np.array([b[1] for b in biases], np.int32),
        bias_values=np.array([b[2] for b in biases], np.float32),
        wanted_logits=np.empty(0, np.int32),
    )


def expected(logits: torch.Tensor, params: SamplingParams, said: Said) -> torch.Tensor:
    """One row at a time: bias, transformers' repetition penalty, OpenAI's two."""
    row = logits.clone()
    for token, value in params.logit_bias:
        row[token] += value
    known = torch.tensor([said[0] + said[1]], dtype=torch.int64)
    penalise: Callable[..., torch.Tensor] = RepetitionPenaltyLogitsProcessor(
        params.repetition_penalty
    )
    row = penalise(known, row[None])[0]
    for token in set(said[1]):
        count = said[1].count(token)
        if token < WIDTH:
            row[token] -= count * params.frequency_penalty + params.presence_penalty
    return row


ids = st.lists(st.integers(0, WIDTH + 1), max_size=8)  # some that the model has no logit for
penalties = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.25, 3.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.25]),
    logit_bias=st.lists(st.tuples(st.integers(0, WIDTH - 1), st.sampled_from([-4.0, 2.5]))).map(
        tuple
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(penalties, ids, ids, st.booleans()), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_rows_are_biased_and_penalised_as_by_the_book_the_id_in_flight_included(
    rows: list[tuple[SamplingParams, list[int], list[int], bool]], seed: int
) -> None:
    logits = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(seed)) * 2
    params = [row[0] for row in rows]
    last_ids = np.array([3, 8, 0], np.int32)
    sources = [i % 3 if flying else -1 for i, (_, _, _, flying) in enumerate(rows)]
    inputs = step(params, [(prompt, output) for _, prompt, output, _ in rows], sources=sources)
    ours = logits.clone()
    changed = adjust(ours, inputs, last_ids)
    for i, (p, prompt, output, flying) in enumerate(rows):
        known = (prompt, output + [int(last_ids[i % 3])] * flying)
        assert torch.allclose(ours[i], expected(logits[i], p, known), atol=1e-5)
        if i not in changed:
            assert torch.equal(ours[i], logits[i])


def test_the_prompt_counts_for_repetition_only() -> None:
    logits = torch.ones(2, WIDTH)
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams(presence_penalty=1.0)]
    adjust(logits, step(params, [([1], [2]), ([1], [2])]), None)
    assert logits[0].tolist()[:4] == [1.0, 0.5, 0.5, 1.0]
    assert logits[1].tolist()[:4] == [1.0, 1.0, 0.0, 1.0]


def test_a_negative_logit_is_multiplied_so_that_it_falls_too() -> None:
    logits = torch.full((1, WIDTH), -1.0)
    adjust(logits, step([SamplingParams(repetition_penalty=2.0)], [([1, 1], [1])]), None)
    assert logits[0].tolist()[:3] == [-1.0, -2.0, -1.0]


def test_rows_that_ask_for_nothing_are_not_touched_whatever_their_sources() -> None:
    logits = torch.ones(1, WIDTH)
    assert len(adjust(logits, step([OFF], [([1], [2])], sources=[5]), None)) == 0
    assert torch.equal(logits, torch.ones(1, WIDTH))


def test_a_source_belongs_to_the_row_and_not_to_the_sample() -> None:
    shy = SamplingParams(presence_penalty=1.0)
    inputs = msgspec.structs.replace(
        step([shy], [([5], [])]),
        query_starts=np.array([0, 3, 4], np.int32),  # a prompt chunk that does not sample first
        positions=np.array([0, 1, 2, 1], np.int32),
        logit_positions=np.array([3], np.int32),
        sources=np.array([-1, 1], np.int32),
    )
    logits = torch.zeros(1, WIDTH)
    adjust(logits, inputs, np.array([3, 4], np.int32))
    assert logits[0].nonzero().tolist() == [[4]]


@pytest.mark.parametrize("last_ids", [None, np.zeros(1, np.int32)])
def test_an_id_in_flight_that_was_never_drawn_is_refused(last_ids: np.ndarray | None) -> None:
    inputs = step([SamplingParams(presence_penalty=1.0)], [([1], [2])], sources=[1])
    with pytest.raises(ChannelError, match="ids of the previous step"):
        adjust(torch.zeros(1, WIDTH), inputs, last_ids)


def test_biases_of_one_token_add_up_and_unknown_tokens_are_ignored() -> None:
    bias = ((3, 1.0), (3, 1.5), (WIDTH, 9.0), (-1, 9.0))
    logits = torch.zeros(1, WIDTH)
    assert adjust(logits, step([SamplingParams(logit_bias=bias)], [([], [])]), None).tolist() == [0]
    assert logits[0].nonzero().tolist() == [[3]]
    assert logits[0, 3] == 2.5
