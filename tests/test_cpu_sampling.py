"""Native sampling against the sampler in torch, of which it is the twin.

Their softmax differs in the last bits, so an id may differ where the uniform or a filter's
threshold falls within some 1e-7 of an edge.  On logits with few different values (ties, where the
order matters) edges are far apart and ids must be equal; on noise, one of 32 may differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_serving.agent.native_sampler import NativeSampler
from llm_serving.agent.philox import uniforms
from llm_serving.agent.sampler import SampledColumns, Sampler
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.kernels.cpu.digest import Digest
from llm_serving.step_arrays import StepInputs
from llm_serving.step_packing import INPUT_NAMES
from tests.native_kernels import native_or_skip

native = native_or_skip()
torch.set_num_threads(1)

Floats = npt.NDArray[np.float32]
ISAS = native.supported()
POSITION = 9


def records(params: Sequence[SamplingParams]) -> npt.NDArray[Any]:
    return np.frombuffer(b"".join(p.record() for p in params), SAMPLING_DTYPE)


def theirs(logits: Floats, params: Sequence[SamplingParams]) -> SampledColumns:
    n = len(params)
    nothing = np.zeros(0, np.int32)
    inputs = StepInputs(
        step_id=1,
        input_ids=np.zeros(n, np.int32),
        positions=np.full(n, POSITION - 1, np.int32),
        slots=nothing,
        query_starts=np.arange(n + 1, dtype=np.int32),
        context_lens=nothing,
        block_tables=nothing.reshape(0, 1),
        sources=np.full(n, -1, np.int32),
        adapter_ids=nothing,
        logit_positions=np.arange(n, dtype=np.int32),
        sampling=records(params),
        history_starts=np.zeros(n + 1, np.int32),
        history_ids=nothing,
        history_prompt_lens=np.zeros(n, np.int32),
        bias_rows=nothing,
        bias_ids=nothing,
        bias_values=np.zeros(0, np.float32),
        wanted_logits=nothing,
    )
    sampler = Sampler(logits.shape[1], n)
    return sampler.sample(torch.from_numpy(logits.copy()), inputs, None)


def ours(
    logits: Floats,
    params: Sequence[SamplingParams],
    isa: str = "auto",
    num_threads: int = 1,
    adjusted: Floats | None = None,
    digest: Digest | None = None,
    has_logits: bool = True,
) -> SampledColumns:
    n, width = logits.shape
    num_top = max((p.num_logprobs for p in params), default=0)
    columns = SampledColumns(
        token_ids=np.full(n, -7, np.int32),
        logprobs=np.full(n, np.nan, np.float32),
        top_ids=np.full((n, num_top), -1, np.int32),
        top_logprobs=np.full((n, num_top), -np.inf, np.float32),
        finite=np.zeros(n, np.uint8),
    )
    pool = native.Pool(num_threads)
    sampler = native.RowSampler(native.kernels(isa), pool, width)
    changed = None
    if adjusted is not None:
        changed = (adjusted.view(np.uint32) != logits.view(np.uint32)).any(1).astype(np.uint8)
    sampler.sample(
        logits.copy() if has_logits else None,
        None if adjusted is None else adjusted.copy(),
        changed,
        records(params).view(np.uint8).reshape(n, -1),
        np.full(n, POSITION, np.int32),
        None if digest is None else digest.columns(),
        None if digest is None else digest.maxima,
        columns.token_ids,
        columns.logprobs,
        columns.finite,
        columns.top_ids,
        columns.top_logprobs,
    )
    return dataclasses.replace(columns, finite=columns.finite.astype(bool))


def noise(rows: int, width: int, seed: int = 0, scale: float = 3.0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32) * np.float32(
        scale
    )


def coarse(rows: int, width: int, seed: int = 0) -> Floats:
    """Few different logits, nearly all ties."""
    return np.round(noise(rows, width, seed, 2.0))


# ---------------------------------------------------------------- greedy, log-probabilities


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 255, 2047, 2048, 2049, 5000, 49152])
def test_greedy_is_the_lowest_id_of_the_largest_logit_and_its_logprob(isa: str, width: int) -> None:
    for logits in (coarse(6, width), noise(6, width)):
        params = [SamplingParams(num_logprobs=k) for k in (0, 1, 2, 5, 20, 20)]
        got, want = ours(logits, params, isa, 2), theirs(logits, params)
        np.testing.assert_array_equal(got.token_ids, logits.argmax(1))
        np.testing.assert_array_equal(got.token_ids, want.token_ids)
        np.testing.assert_array_equal(got.top_ids, want.top_ids)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=4e-6)
        np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, atol=4e-6)
        assert got.finite.all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [5, 40, 5000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(
    isa: str, width: int, value: float
) -> None:
    for place in {0, width // 2, width - 1}:
        logits = noise(3, width)
        logits[1, place] = value
        for temperature in (0.0, 1.0):
            params = [SamplingParams(temperature=temperature, seed=3, num_logprobs=2)] * 3
            got, want = ours(logits, params, isa), theirs(logits, params)
            np.testing.assert_array_equal(got.finite, [True, False, True])
            np.testing.assert_array_equal(got.token_ids, want.token_ids)
            np.testing.assert_array_equal(got.top_ids, want.top_ids)


@pytest.mark.parametrize("isa", ISAS)
def test_logits_near_the_end_of_float32_are_finite(isa: str) -> None:
    logits = np.array([[3.0e38, -3.0e38, 0.0, 3.0e38]], np.float32)
    for temperature in (0.0, 1e-3, 1.0):
        params = [SamplingParams(temperature=temperature, seed=1)]
        got, want = ours(logits, params, isa), theirs(logits, params)
        assert got.finite.all()
        np.testing.assert_array_equal(got.token_ids, want.token_ids)


def digest_of(logits: Floats, params: Sequence[SamplingParams]) -> Digest:
    """What a plan says of such rows."""
    n, width = logits.shape
    summed = [p.temperature if p.temperature >= 1e-3 and not p.top_k else 0.0 for p in params]
    digest = Digest.empty(native, n, width, True)
    with np.errstate(invalid="ignore"):
        for i, first in enumerate(range(0, width, 2048)):
            part, found = logits[:, first : first + 2048].astype(np.float64), digest.ranges[:, i]
            found["max"], found["arg_max"] = part.max(1), first + part.argmax(1)
            away = part - part.max(1, keepdims=True)
            found["sum"] = np.exp(away).sum(1)
            found["heated"] = [
                np.exp(row / heat).sum() if heat else 0.0
                for row, heat in zip(away, summed, strict=True)
            ]
            found["max"][~np.isfinite(part).all(1)] = np.nan
    padded = np.full((n, -(-width // 128) * 128), -np.inf, np.float32)
    padded[:, :width] = logits
    assert digest.maxima is not None
    digest.maxima[:] = padded.reshape(n, -1, 8, 16).max(2).reshape(n, -1)
    return digest


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [3, 5000])
def test_what_is_known_of_a_row_is_not_worked_out_again(isa: str, width: int) -> None:
    logits = coarse(5, width)
    logits[3, 1] = np.inf
    greedy = [SamplingParams()] * 5
    want = ours(logits, greedy, isa, 2)
    for has_logits in (True, False):
        got = ours(logits, greedy, isa, 2, digest=digest_of(logits, greedy), has_logits=has_logits)
        np.testing.assert_array_equal(got.token_ids, want.token_ids)
        np.testing.assert_array_equal(got.finite, [True, True, True, False, True])
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=4e-6)
    lie = digest_of(logits, greedy)
    lie.ranges["max"] = lie.ranges["max"].max(1, keepdims=True)
    lie.ranges["arg_max"] = 2  # so that who looks is found out
    lie.ranges["sum"] = np.exp(1) / lie.ranges.shape[1]
    got = ours(logits, greedy, isa, digest=lie, has_logits=False)
    assert got.token_ids[[0, 1, 2, 4]].tolist() == [2] * 4
    np.testing.assert_allclose(got.logprobs[[0, 1, 2, 4]], -1, atol=1e-6)
    drawn = [SamplingParams(temperature=0.9, seed=i, num_logprobs=2) for i in range(5)]
    with pytest.raises(ValueError, match="only greedy rows"):
        ours(logits, drawn, isa, digest=digest_of(logits, drawn), has_logits=False)
    with pytest.raises(ValueError, match="either logits or ranges"):
        ours(logits, greedy, isa, has_logits=False)
    with pytest.raises(ValueError, match="go together"):
        ours(logits, drawn, isa, digest=Digest(digest_of(logits, drawn).ranges, None))
    got = ours(logits, drawn, isa, digest=digest_of(logits, drawn))
    np.testing.assert_array_equal(got.token_ids, ours(logits, drawn, isa).token_ids)


def step_of(params: SamplingParams, **more: Any) -> StepInputs:
    nothing = np.zeros(0, np.int32)
    given = dict.fromkeys(INPUT_NAMES, nothing) | {"sampling": records([SamplingParams(), params])}
    return StepInputs(1, **{**given, **more})


@pytest.mark.parametrize(
    ("params", "more", "needs"),
    [
        ({}, {}, False),
        ({"seed": 2**63 + 5, "sample_index": 3}, {}, False),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5}, {}, False),
        ({"temperature": 1.0}, {}, True),
        ({"num_logprobs": 1}, {}, True),
        ({"repetition_penalty": 1.1}, {}, True),
        ({"presence_penalty": 0.1}, {}, True),
        ({"frequency_penalty": -0.1}, {}, True),
        ({}, {"bias_rows": np.zeros(1, np.int32)}, True),
        ({}, {"wanted_logits": np.zeros(1, np.int32)}, True),
    ],
)
def test_only_a_step_whose_rows_are_all_plainly_greedy_does_without_logits(
    params: dict[str, Any], more: dict[str, Any], needs: bool
) -> None:
    assert NativeSampler.needs_logits(step_of(SamplingParams(**params), **more)) is needs


# ---------------------------------------------------------------- draws

CHOICES = [
    {},
    {"top_k": 1}, {"top_k": 7}, {"top_k": 50}, {"top_k": 127}, {"top_k": 128}, {"top_k": 3000},
    {"top_p": 0.1}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.95}, {"top_p": 0.999},
    {"top_p": 0.99995},
    {"min_p": 0.05}, {"min_p": 0.5}, {"min_p": 1.0},
    {"typical_p": 0.2}, {"typical_p": 0.9}, {"typical_p": 0.995},
    {"top_k": 40, "top_p": 0.8}, {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
    {"typical_p": 0.5, "top_k": 2000},
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("width", [3, 37, 300, 5003])
def test_ids_are_those_of_the_sampler_in_torch(
    isa: str, options: dict[str, Any], width: int
) -> None:
    few_values = [coarse(16, width), np.zeros((16, width), np.float32)]
    for seed, logits in enumerate([*few_values, noise(32, width), noise(32, width, 1, 0.3)]):
        for temperature in (0.7, 1.0):
            params = [
                SamplingParams(temperature=temperature, seed=100 * seed + i, **options)
                for i in range(len(logits))
            ]
            got, want = ours(logits, params, isa, 2), theirs(logits, params)
            same = got.token_ids == want.token_ids
            assert np.count_nonzero(~same) <= (seed >= len(few_values))
            np.testing.assert_allclose(got.logprobs[same], want.logprobs[same], atol=4e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_any_parameters_share_a_step_and_do_not_notice(isa: str) -> None:
    rng = np.random.default_rng(4)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.4, 1.0, 2.0])),
            seed=int(rng.integers(2**63)),
            num_logprobs=int(rng.choice([0, 3])),
            **CHOICES[int(rng.integers(len(CHOICES)))],  # type: ignore[arg-type]
        )
        for _ in range(64)
    ]
    logits = noise(64, 9001, 8, 2.0)
    together, two = ours(logits, params, isa), ours(logits, params, isa, 2)
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        assert getattr(together, name).tobytes() == getattr(two, name).tobytes()
    for row in range(64):
        alone = ours(logits[row : row + 1], params[row : row + 1], isa)
        assert alone.token_ids[0] == together.token_ids[row]
        assert alone.logprobs.tobytes() == together.logprobs[row : row + 1].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_equal_logits_at_the_edge_of_top_p_keep_the_highest_ids(isa: str) -> None:
    logits = np.zeros((200, 64), np.float32)
    logits[:, 5] = 1.0
    for top_p in (0.2, 0.5, 0.75):
        params = [SamplingParams(temperature=1.0, seed=i, top_p=top_p) for i in range(200)]
        got = ours(logits, params, isa).token_ids
        np.testing.assert_array_equal(got, theirs(logits, params).token_ids)
        share = np.exp(1) / (np.exp(1) + 63)
        kept = 64 - np.ceil((top_p - share) * (np.exp(1) + 63) - 1e-9)
        assert got[got != 5].min() >= kept


@pytest.mark.parametrize("isa", ISAS)
def test_a_whole_vocabulary_is_drawn_like_the_sampler_in_torch(isa: str) -> None:
    logits = noise(8, 49152, 2, 2.5)
    for options in CHOICES:
        params = [SamplingParams(temperature=0.8, seed=i, **options) for i in range(8)]  # type: ignore[arg-type]
        got, want = ours(logits, params, isa), theirs(logits, params)
        np.testing.assert_array_equal(got.token_ids, want.token_ids)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_what_is_known_of_a_row_leads_to_the_same_id_as_all_its_logits(
    isa: str, options: dict[str, Any]
) -> None:
    """An adjusted row is drawn from without a digest."""
    for scale in (0.3, 2.0, 5.0):
        logits = noise(32, 20001, 3, scale)
        logits[:, 77] = -60.0  # hopeless, so that it does not matter what is added
        adjusted = logits.copy()
        adjusted[:, 77] -= 1
        params = [SamplingParams(temperature=0.8, seed=i, **options) for i in range(32)]
        known, all_of_it = ours(logits, params, isa), ours(logits, params, isa, 1, adjusted)
        assert np.count_nonzero(known.token_ids != all_of_it.token_ids) <= 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str)
def test_what_cannot_be_drawn_is_not_looked_at(isa: str, options: dict[str, Any]) -> None:
    logits = np.full((16, 49152), -30, np.float32)
    likely = np.random.default_rng(1).permuted(np.tile(np.arange(49152), (16, 1)), axis=1)[:, :300]
    np.put_along_axis(logits, likely, noise(16, 300, 2), 1)
    params = [SamplingParams(temperature=0.9, seed=i, num_logprobs=3, **options) for i in range(16)]
    digest = digest_of(logits, params)
    want = ours(logits, params, isa)
    groups = logits.reshape(16, -1, 128)
    groups[groups.max(2) < -20] = 1e9  # in which nobody sees it
    got = ours(logits, params, isa, digest=digest)
    np.testing.assert_array_equal(got.token_ids, want.token_ids)
    np.testing.assert_array_equal(got.top_ids, want.top_ids)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str)
def test_what_is_known_of_the_models_logits_says_nothing_of_adjusted_ones(
    isa: str, options: dict[str, Any]
) -> None:
    logits, adjusted = noise(32, 9001, 5), noise(32, 9001, 6)
    params = [SamplingParams(temperature=0.8, seed=i, **options) for i in range(32)]
    got, want = ours(logits, params, isa, 1, adjusted), ours(adjusted, params, isa)
    assert np.count_nonzero(got.token_ids != want.token_ids) <= 1


@pytest.mark.parametrize("isa", ISAS)
def test_a_plain_draw_looks_at_one_range_only(isa: str) -> None:
    logits = noise(16, 49152, 2)
    params = [SamplingParams(temperature=0.9, seed=i) for i in range(16)]
    digest, want = digest_of(logits, params), ours(logits, params, isa)
    for row, token in enumerate(want.token_ids):
        first = token // 2048 * 2048
        logits[row, :first] = logits[row, first + 2048 :] = 1e9
    np.testing.assert_array_equal(
        ours(logits, params, isa, digest=digest).token_ids, want.token_ids
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [1e-6, 9e-4, 1e-3, 0.05, 5.0, 1e6])
def test_any_temperature(isa: str, temperature: float) -> None:
    logits = noise(32, 1000, 5)
    for options in ({}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.3}):
        params = [SamplingParams(temperature=temperature, seed=i, **options) for i in range(32)]  # type: ignore[arg-type]
        got, want = ours(logits, params, isa), theirs(logits, params)
        np.testing.assert_array_equal(got.token_ids, want.token_ids)


# ---------------------------------------------------------------- biases and penalties


@pytest.mark.parametrize("isa", ISAS)
def test_adjusted_rows_are_drawn_from_but_their_logprobs_are_the_models(isa: str) -> None:
    logits = noise(4, 700)
    adjusted = logits.copy()
    adjusted[0, :] = -np.inf
    adjusted[0, 333] = 1.0  # a bias that bans all others
    adjusted[1, 5:] = -np.inf
    adjusted[2, :] = -np.inf  # nothing is left
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature, seed=6, num_logprobs=3, top_p=0.99)] * 4
        got, plain = ours(logits, params, isa, 1, adjusted), ours(logits, params, isa)
        assert got.token_ids[0] == 333
        assert got.token_ids[1] < 5
        assert 0 <= got.token_ids[2] < 700
        assert got.token_ids[3] == plain.token_ids[3]
        np.testing.assert_array_equal(got.finite, [True, True, False, True])
        np.testing.assert_array_equal(got.top_ids, plain.top_ids)
        logprob = torch.from_numpy(logits[0]).log_softmax(-1)[333]
        np.testing.assert_allclose(got.logprobs[0], logprob, atol=4e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adjusted_rows_without_an_order_are_not_finite(isa: str, value: float) -> None:
    logits = noise(1, 50)
    adjusted = logits.copy()
    adjusted[0, 49] = value
    assert not ours(logits, [SamplingParams()], isa, 1, adjusted).finite[0]


def test_random_numbers_are_those_of_philox() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**64, 200, np.uint64, endpoint=False)
    positions = rng.integers(0, 2**31 - 1, 200, np.int32)
    indices = rng.integers(0, 100, 200, np.int32)
    expected = uniforms(seeds, positions, indices)
    got = [
        native.uniform(int(s), int(p), int(i))
        for s, p, i in zip(seeds, positions, indices, strict=True)
    ]
    np.testing.assert_array_equal(got, expected)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        native.RowSampler(native.kernels(), native.Pool(1), 0)
    with pytest.raises(ValueError, match="logits must be a contiguous float32 array"):
        ours(np.zeros((1, 4)), [SamplingParams()])  # type: ignore[arg-type]
