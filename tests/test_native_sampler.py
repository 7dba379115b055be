"""A step of the native sampler: which rows biases and penalties cost anything.

What one row of the kernels draws is compared in test_cpu_sampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llm_serving.agent.native_sampler import NativeSampler
from llm_serving.agent.sampler import Sampler
from llm_serving.generation import SamplingParams
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.step_arrays import StepInputs
from tests.test_cpu_sampling import noise
from tests.test_sampler import step

ROWS, WIDTH = 8, 5000
UNTOUCHED = 1234.5
ASKED = {
    2: SamplingParams(repetition_penalty=1.7, num_logprobs=1),
    3: SamplingParams(logit_bias=((17, 30.0), (17, 2.0), (4, -1.0)), num_logprobs=1),
    5: SamplingParams(presence_penalty=2.0, frequency_penalty=2.0, num_logprobs=1),
    7: SamplingParams(repetition_penalty=1.2, logit_bias=((8, 99.0),), num_logprobs=1),
}


Step = tuple[torch.Tensor, StepInputs]


def step_with(asking: Sequence[int], num_rows: int = ROWS, temperature: float = 0.0) -> Step:
    """Rows with a history, of which some ask; their logits are nearly all ties."""
    plain = SamplingParams(temperature=temperature, seed=4, num_logprobs=1)
    params = [ASKED[row] if row in asking else plain for row in range(num_rows)]
    logits = torch.from_numpy(np.round(noise(num_rows, WIDTH, seed=len(asking), scale=2.0)))
    best = logits.argmax(1).tolist()  # said before, so that penalties change what is drawn
    return logits, step(
        params, histories=[([1, best[row]], [best[row], 2]) for row in range(num_rows)]
    )


@pytest.fixture
def sampler() -> NativeSampler:
    return NativeSampler(NativeKernels(1), WIDTH, ROWS)


@pytest.mark.parametrize("asking", [[], [2], [3], [5], [2, 3, 5, 7]])
def test_rows_without_bias_or_penalty_are_not_copied(
    sampler: NativeSampler, asking: list[int]
) -> None:
    logits, inputs = step_with(asking)
    memory = sampler._scratch.like(logits, "adjusted").fill_(UNTOUCHED)
    sampler.sample(logits.clone(), inputs, None)
    written = (memory != UNTOUCHED).any(1)
    assert written.nonzero().flatten().tolist() == asking
    assert (memory != UNTOUCHED).all(1).nonzero().flatten().tolist() == asking


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_row_gets_what_the_sampler_in_torch_gives_it_whatever_was_there_before(
    sampler: NativeSampler, temperature: float
) -> None:
    steps = [([2, 3, 5, 7], ROWS), ([5], ROWS), ([], ROWS), ([2, 3], 4), ([2, 3, 5, 7], ROWS)]
    for asking, num_rows in steps:
        logits, inputs = step_with(asking, num_rows, temperature)
        got = sampler.sample(logits.clone(), inputs, None)
        want = Sampler(WIDTH, ROWS).sample(logits.clone(), inputs, None)
        np.testing.assert_array_equal(got.token_ids, want.token_ids)
        np.testing.assert_array_equal(got.top_ids, want.top_ids)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=4e-6)
        assert got.finite.all()
        if asking and temperature == 0:
            assert (got.token_ids != logits.argmax(1).numpy())[asking].all()


def test_what_is_not_finite_is_named_in_rows_that_ask_and_in_others(sampler: NativeSampler) -> None:
    logits, inputs = step_with([2, 7])
    logits[2, 40], logits[4, 40] = torch.nan, torch.inf
    got = sampler.sample(logits, inputs, None)
    assert np.flatnonzero(~got.finite).tolist() == [2, 4]


def test_a_step_in_inference_mode_leaves_memory_that_one_outside_can_use(
    sampler: NativeSampler,
) -> None:
    logits, inputs = step_with([2])
    with torch.inference_mode():
        inside = sampler.sample(logits.clone(), inputs, None)
    outside = sampler.sample(logits.clone(), inputs, None)
    np.testing.assert_array_equal(inside.token_ids, outside.token_ids)
