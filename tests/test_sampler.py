from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_serving.agent.drawing import draw
from llm_serving.agent.filters import narrow
from llm_serving.agent.philox import uniforms
from llm_serving.agent.sampler import SampledColumns, Sampler
from llm_serving.agent.scratch import Scratch
from llm_serving.errors import ChannelError
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs
from llm_serving.step_packing import INPUT_NAMES

torch.set_num_threads(1)

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=1.0, seed=5)


def step(
    params: Sequence[SamplingParams],
    *,
    positions: Sequence[int] | None = None,
    histories: Sequence[tuple[list[int], list[int]]] = (),
) -> StepInputs:
    """One decode row per sample; `positions` are those of the drawn tokens, all read-only."""
    n = len(params)
    said = [prompt + output for prompt, output in histories] or [[]] * n
    biases = [(i, *bias) for i, p in enumerate(params) for bias in p.logit_bias]
    nothing = np.zeros(0, np.int32)
    places = np.full(n, 9) if positions is None else np.array(positions)
    inputs = StepInputs(
        step_id=1,
        input_ids=np.zeros(n, np.int32),
        positions=(places - 1).astype(np.int32),
        slots=nothing,
        query_starts=np.arange(n + 1, dtype=np.int32),
        context_lens=nothing,
        block_tables=nothing.reshape(0, 1),
        sources=np.full(n, -1, np.int32),
        adapter_ids=nothing,
        logit_positions=np.arange(n, dtype=np.int32),
        sampling=np.frombuffer(b"".join(p.record() for p in params), SAMPLING_DTYPE),
        history_starts=np.cumsum([0, *map(len, said)]).astype(np.int32),
        history_ids=np.array([token for ids in said for token in ids], np.int32),
        history_prompt_lens=np.array([len(p) for p, _ in histories] or [0] * n, np.int32),
        bias_rows=np.array([b[0] for b in biases], np.int32),
        bias_ids=np.array([b[1] for b in biases], np.int32),
        bias_values=np.array([b[2] for b in biases], np.float32),
        wanted_logits=np.empty(0, np.int32),
    )
    for name in INPUT_NAMES:
        getattr(inputs, name).flags.writeable = False
    return inputs


def sample(logits: torch.Tensor, *params: SamplingParams, **options: Any) -> SampledColumns:
    sampler = Sampler(logits.shape[1], len(params))
    return sampler.sample(logits.clone(), step(params, **options), None)


def noise(rows: int, width: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("width", [3, 255, 512, 1000])
def test_greedy_is_the_largest_logit_and_of_equals_the_lowest_id(width: int) -> None:
    logits = noise(6, width).round()
    expected = logits.numpy().argmax(axis=1)
    assert sample(logits, *[GREEDY] * 6).token_ids.tolist() == expected.tolist()


def test_greedy_ignores_filters_but_not_penalties() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.5]])
    odd = SamplingParams(top_k=1, top_p=0.1, min_p=1.0, typical_p=0.1)
    assert sample(logits, odd).token_ids.tolist() == [1]
    shy = SamplingParams(repetition_penalty=2.0)
    assert sample(logits, shy, histories=[([1], [])]).token_ids.tolist() == [2]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from([7, 256, 600]),
    st.integers(0, 2**64 - 1),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 3, 100, 300]),
        top_p=st.sampled_from([1.0, 0.9]),
        typical_p=st.sampled_from([1.0, 0.8]),
    ),
)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution_by_id(
    width: int, seed: int, params: SamplingParams
) -> None:
    params = dataclasses.replace(params, seed=seed)
    logits = noise(1, width, seed % 1000)
    scores = logits / params.temperature
    narrow(scores, step([params]).sampling, Scratch())
    cumulative = scores.double().softmax(-1).cumsum(-1)[0].numpy()
    drawn = uniforms(np.array([seed], np.uint64), np.array([9], np.int32), np.zeros(1, np.int32))
    expected = int(np.searchsorted(cumulative, drawn[0], side="right"))
    assert sample(logits, params).token_ids.tolist() == [expected]


@pytest.mark.parametrize(
    ("kept", "uniform", "column"),
    [
        ([0, 1], 0.0, 0),
        ([0, 1], 0.5, 1),
        ([3, 4], 0.0, 3),
        ([3, 4], 0.5, 4),
        ([255, 512], 0.5, 512),
        ([0, 700], 0.5, 700),
        ([0, 700], 1 - 2**-53, 700),
    ],
)
def test_a_uniform_on_an_edge_belongs_to_the_kept_token_above_it(
    kept: list[int], uniform: float, column: int
) -> None:
    scores = torch.full((1, 768), -torch.inf)
    scores[0, kept] = 1.0
    drawn = draw(scores, torch.tensor([uniform], dtype=torch.float64), Scratch())
    assert drawn.tolist() == [column]


@pytest.mark.parametrize("top_k", [1, 5, 100, 127, 128, 200])
@pytest.mark.parametrize("kind", ["random", "tied", "flat"])
def test_a_small_top_k_on_its_short_list_is_the_whole_vocabulary_narrowed(
    top_k: int, kind: str
) -> None:
    logits = {"random": noise(40, 700), "tied": noise(40, 700).round(), "flat": noise(40, 700) * 0}
    params = [SamplingParams(temperature=0.9, top_k=top_k, top_p=0.9, seed=s) for s in range(40)]
    scores = logits[kind] / torch.tensor(0.9)
    narrow(scores, step(params).sampling, Scratch())
    columns = sample(logits[kind], *params)
    cumulative = scores.double().softmax(-1).cumsum(-1).numpy()
    drawn = uniforms(np.arange(40, dtype=np.uint64), np.full(40, 9, np.int32), np.zeros(40, int))
    expected = (cumulative <= drawn[:, None]).sum(axis=1)
    assert columns.token_ids.tolist() == expected.tolist()


def test_a_temperature_near_zero_is_greedy_and_a_huge_one_is_even() -> None:
    logits = noise(1, 50)
    cold = [SamplingParams(temperature=t, seed=s) for t in (1e-45, 1e-30) for s in range(20)]
    assert set(sample(logits.expand(40, 50), *cold).token_ids) == {int(logits.argmax())}
    hot = [SamplingParams(temperature=1e30, seed=s) for s in range(400)]
    assert len(set(sample(logits.expand(400, 50), *hot).token_ids)) == 50


def quantile_of_chi_square(freedom: int) -> float:
    """At p = 0.999, by Wilson and Hilferty (1931); within 1 % from 5 degrees of freedom on."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + 3.0902 * math.sqrt(share)) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.6, seed=2**64 - 1),
        SamplingParams(temperature=1.3, top_k=12, seed=3),
        SamplingParams(temperature=1.0, top_p=0.8, seed=2**63),
        SamplingParams(temperature=1.5, min_p=0.05, seed=5),
        SamplingParams(temperature=1.0, typical_p=0.7, seed=6),
        SamplingParams(temperature=1.2, top_k=200, top_p=0.95, min_p=0.01, typical_p=0.9, seed=7),
    ],
)
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_the_drawn_tokens_have_the_analytic_distribution(
    params: SamplingParams, varied: str
) -> None:
    n, width = 8192, 260
    logits = noise(1, width, seed=11, scale=2.0)
    many, positions = [params] * n, list(range(1, n + 1))
    if varied == "seed":
        many = [dataclasses.replace(params, seed=(params.seed + i) % 2**64) for i in range(n)]
        positions = [1] * n
    drawn = sample(logits.expand(n, width), *many, positions=positions).token_ids

    scores = logits / torch.tensor(params.temperature)
    narrow(scores, step([params]).sampling, Scratch())
    expected = scores.double().softmax(-1)[0].numpy() * n
    observed = np.bincount(drawn, minlength=width)
    assert observed[expected == 0].sum() == 0
    common = expected >= 8
    cells = np.append(expected[common], expected[~common].sum())
    counts = np.append(observed[common], observed[~common].sum())
    chi_square = ((counts - cells) ** 2 / np.maximum(cells, 1)).sum()
    assert common.sum() > 5
    assert chi_square < quantile_of_chi_square(len(cells) - 1)


# ---------------------------------------------------------------- who decides it


def test_seed_position_and_sample_index_each_give_another_draw() -> None:
    logits = noise(1, 5000, scale=0.1).expand(6, 5000)
    params = [WARM, WARM, *(dataclasses.replace(WARM, seed=s) for s in (6, 5 + 2**32, 5 + 2**63))]
    params.append(dataclasses.replace(WARM, sample_index=1))
    drawn = sample(logits, *params, positions=[9, 10, 9, 9, 9, 9]).token_ids
    assert len(set(drawn)) == 6


def test_the_position_is_that_of_the_drawn_token_also_after_a_prompt_chunk() -> None:
    logits = noise(1, 5000, scale=0.1)
    alone = sample(logits, WARM, positions=[4])
    chunk = msgspec.structs.replace(
        step([WARM]),
        positions=np.array([8, 1, 2, 3], np.int32),
        query_starts=np.array([0, 1, 4], np.int32),
        sources=np.array([-1, -1], np.int32),
        logit_positions=np.array([3], np.int32),
    )
    assert Sampler(5000, 1).sample(logits.clone(), chunk, None).token_ids == alone.token_ids


OPTIONS: dict[str, list[Any]] = {
    "temperature": [0.0, 0.7, 1.0],
    "top_k": [0, 0, 20, 400],
    "top_p": [1.0, 0.9],
    "min_p": [0.0, 0.02],
    "typical_p": [1.0, 0.9],
    "repetition_penalty": [1.0, 1.3],
    "presence_penalty": [0.0, 0.5],
    "frequency_penalty": [0.0, -0.3],
    "num_logprobs": [0, 1, 4, 20],
    "logit_bias": [(), ((3, 2.0), (7, -5.0))],
}


@pytest.mark.parametrize("width", [768, 1003])
@pytest.mark.parametrize("kind", ["random", "bfloat16"])
def test_a_row_gives_the_same_bits_alone_and_in_any_company(width: int, kind: str) -> None:
    rng = np.random.default_rng(width)
    params = [
        SamplingParams(
            seed=i, **{name: values[rng.integers(len(values))] for name, values in OPTIONS.items()}
        )
        for i in range(30)
    ]
    histories = [(rng.integers(0, width, 5).tolist(), [1, 2, 2, 9]) for _ in params]
    logits = noise(30, width, seed=2)
    if kind == "bfloat16":
        logits = logits.bfloat16().float()
    sampler = Sampler(width, 64)

    def columns(rows: list[int]) -> list[tuple[object, ...]]:
        inputs = step(
            [params[i] for i in rows],
            positions=[i + 1 for i in rows],
            histories=[histories[i] for i in rows],
        )
        out = sampler.sample(logits[rows], inputs, None)
        return [
            (
                out.token_ids[j],
                out.logprobs[j].tobytes(),
                out.finite[j],
                out.top_ids[j, : params[i].num_logprobs].tobytes(),
                out.top_logprobs[j, : params[i].num_logprobs].tobytes(),
            )
            for j, i in enumerate(rows)
        ]

    alone = [columns([i])[0] for i in range(30)]
    for size in (2, 5, 13, 30, 64):
        rows = rng.integers(0, 30, size).tolist()
        assert columns(rows) == [alone[i] for i in rows]


def test_a_row_with_an_id_in_flight_is_penalised_for_it() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.5]]).expand(2, 4)
    shy = SamplingParams(presence_penalty=2.0)
    inputs = step([shy, shy], histories=[([3], [2]), ([3], [2])])
    inputs = msgspec.structs.replace(inputs, sources=np.array([4, -1], np.int32))
    last_ids = np.array([0, 0, 0, 0, 1], np.int32)
    assert Sampler(4, 2).sample(logits.clone(), inputs, last_ids).token_ids.tolist() == [3, 1]


# ---------------------------------------------------------------- what is reported


def test_logprobs_are_of_the_model_before_everything_else() -> None:
    logits = noise(3, 100)
    params = [
        GREEDY,
        SamplingParams(temperature=0.3, top_k=2, seed=1, num_logprobs=3),
        SamplingParams(logit_bias=((7, 50.0),), presence_penalty=2.0, num_logprobs=3),
    ]
    out = sample(logits, *params, histories=[([1], [2])] * 3)
    expected = logits.double().log_softmax(-1).numpy()
    assert out.token_ids[2] == 7
    assert out.logprobs == pytest.approx(expected[range(3), out.token_ids], abs=1e-5)
    for i in (1, 2):
        assert out.top_ids[i].tolist() == np.argsort(-expected[i])[:3].tolist()
        assert out.top_logprobs[i] == pytest.approx(expected[i, out.top_ids[i]], abs=1e-5)
    dtypes = [getattr(out, f.name).dtype for f in dataclasses.fields(out)]
    assert dtypes == [np.int32, np.float32, np.int32, np.float32, np.bool_]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 4, 40, 300]),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
)
def test_alternatives_come_likeliest_first_and_of_equals_the_lowest_id(
    width: int, seed: int, scale: float, wanted: list[int]
) -> None:
    logits = noise(len(wanted), width, seed, scale).round()
    out = sample(logits, *[SamplingParams(num_logprobs=n) for n in wanted])
    assert out.top_ids.shape == out.top_logprobs.shape == (len(wanted), max(wanted))
    for i, n in enumerate(wanted):
        expected = np.argsort(-logits[i].numpy(), kind="stable")[:n].tolist()
        rest = max(wanted) - len(expected)
        assert out.top_ids[i].tolist() == expected + [-1] * rest
        assert np.isneginf(out.top_logprobs[i, len(expected) :]).all()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [GREEDY, WARM, SamplingParams(temperature=1.0, top_k=5, top_p=0.9, typical_p=0.9)],
)
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(
    poison: float, params: SamplingParams
) -> None:
    params = dataclasses.replace(params, num_logprobs=2)
    logits = noise(3, 300)
    clean = sample(logits, *[params] * 3)
    logits[1, 17] = poison
    out = sample(logits, *[params] * 3)
    assert out.finite.tolist() == [True, False, True]
    assert 0 <= out.token_ids[1] < 300
    assert np.isfinite(out.logprobs).all()
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        ours, theirs = getattr(out, name), getattr(clean, name)
        assert (ours[[0, 2]] == theirs[[0, 2]]).all()


def test_logits_near_the_end_of_float32_are_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 3e38, 1.0]]).expand(3, 4)
    out = sample(logits, GREEDY, WARM, SamplingParams(temperature=0.01, typical_p=0.5))
    assert out.finite.all()
    assert set(out.token_ids) <= {0, 2}


@pytest.mark.parametrize(
    "params", [GREEDY, WARM, SamplingParams(temperature=1.0, top_p=0.9, typical_p=0.9)]
)
def test_a_bias_forces_and_bans_and_a_row_that_is_all_banned_is_not_finite(
    params: SamplingParams,
) -> None:
    logits = noise(3, 4)
    best = int(logits[1].argmax())
    biases = [((2, 100.0),), ((best, -math.inf),), tuple((i, -math.inf) for i in range(4))]
    rows = [dataclasses.replace(params, logit_bias=bias) for bias in biases]
    out = sample(logits, *rows)
    assert out.token_ids[0] == 2
    assert out.token_ids[1] != best
    assert out.finite.tolist() == [True, True, False]
    assert 0 <= out.token_ids[2] < 4


def test_an_empty_step_samples_nothing() -> None:
    out = sample(torch.zeros(0, 10))
    assert len(out.token_ids) == len(out.logprobs) == len(out.finite) == 0
    assert out.top_ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(1, 9), r"\(1, 9\), expected float32 \(1, 10\)"),
        (torch.zeros(2, 10), r"\(2, 10\), expected"),
        (torch.zeros(1, 10, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(logits: torch.Tensor, words: str) -> None:
    with pytest.raises(ChannelError, match=words):
        Sampler(10, 4).sample(logits, step([GREEDY]), None)
    with pytest.raises(ChannelError, match="5 rows to sample, at most 4"):
        Sampler(10, 4).sample(torch.zeros(5, 10), step([GREEDY] * 5), None)
