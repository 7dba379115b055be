"""Does a step come back as it must: right tokens, right refusals, and nothing remembered?"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from llm_serving.agent.kv_cache import KvCache
from llm_serving.agent.model_runner import ModelRunner, StepColumns
from llm_serving.errors import ChannelError, ConfigError
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.model_card import ModelCard
from llm_serving.step_arrays import StepInputs
from tests.tiny_models import CONTEXT, VOCAB_SIZE, Twin, build_twin

BLOCK_SIZE = 4
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return build_twin(tmp_path_factory.mktemp("model"))


def load(card: ModelCard, phases: list[str] | None = None, **changed: Any) -> ModelRunner:
    settings: dict[str, Any] = {
        "device": "cpu",
        "max_model_len": CONTEXT,
        "block_size": BLOCK_SIZE,
        "num_blocks": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_threads": 1,
        "phase": ([] if phases is None else phases).append,
    }
    return ModelRunner.load(card, **(settings | changed))


@pytest.fixture
def runner(twin: Twin) -> ModelRunner:
    return load(twin.card)


def no_tick() -> None:
    pass


@dataclasses.dataclass
class Row:
    ids: Sequence[int]  # one id of any value where `source` says which
    start: int
    blocks: Sequence[int]
    source: int = -1
    samples: bool = True
    sampling: SamplingParams = GREEDY


def make_step(step_id: int, rows: Sequence[Row]) -> StepInputs:
    """Arrays as they come from shared memory: views that must not be written."""
    starts = np.cumsum([0] + [len(row.ids) for row in rows])
    width = max(len(row.blocks) for row in rows)
    tables = np.array([[*row.blocks] + [-1] * (width - len(row.blocks)) for row in rows])
    places = np.concatenate([np.arange(row.start, row.start + len(row.ids)) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), np.diff(starts))
    samplers = [row for row in rows if row.samples]
    ends = [starts[i + 1] - 1 for i, row in enumerate(rows) if row.samples]
    numbers: dict[str, Any] = {
        "input_ids": [token for row in rows for token in row.ids],
        "positions": places,
        "slots": tables[row_of, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE,
        "query_starts": starts,
        "context_lens": [row.start + len(row.ids) for row in rows],
        "block_tables": tables,
        "sources": [row.source for row in rows],
        "adapter_ids": [0] * len(rows),
        "logit_positions": ends,
        "history_starts": [0] * (len(samplers) + 1),
        "history_ids": [],
        "history_prompt_lens": [0] * len(samplers),
        "bias_rows": [],
        "bias_ids": [],
        "wanted_logits": [],
    }
    arrays: dict[str, Any] = {name: np.array(numbers[name], np.int32) for name in numbers}
    arrays["bias_values"] = np.empty(0, np.float32)
    records = b"".join(row.sampling.record() for row in samplers)
    arrays["sampling"] = np.frombuffer(records, SAMPLING_DTYPE)
    for array in arrays.values():
        array.flags.writeable = False
    return StepInputs(step_id, **arrays)


def replaced(inputs: StepInputs, **values: Any) -> StepInputs:
    arrays: dict[str, Any] = {name: np.array(values[name], np.int32) for name in values}
    return msgspec.structs.replace(inputs, **arrays)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)]


def assert_same(left: StepColumns, right: StepColumns) -> None:
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs", "finite"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_generated_ids_are_the_reference_s_though_each_step_takes_them_from_the_last(
    twin: Twin, runner: ModelRunner
) -> None:
    """Two requests, one of which begins a step later; ids travel only by `sources`."""
    first, second = prompt(9), prompt(5, 1)
    tables = list(range(8)), list(range(20, 28))
    ids: tuple[list[int], list[int]] = ([], [])
    steps = [[Row(first, 0, tables[0])], [Row([0], 9, tables[0], 0), Row(second, 0, tables[1])]]
    steps += [
        [Row([0], 5 + i, tables[1], 1 - i % 2), Row([0], 10 + i, tables[0], i % 2)]
        if i % 2 == 0
        else [Row([0], 10 + i, tables[0], 1), Row([0], 5 + i, tables[1], 0)]
        for i in range(8)
    ]
    for step_id, rows in enumerate(steps):
        columns = runner.execute(make_step(step_id, rows), no_tick)
        assert columns.finite.all()
        for row, token in zip(rows, columns.token_ids, strict=True):
            ids[row.blocks is tables[1]].append(int(token))
    assert ids[0] == twin.generate(first, 10)
    assert ids[1] == twin.generate(second, 9)


def test_a_logprob_is_that_of_the_reference_and_so_are_the_alternatives(
    twin: Twin, runner: ModelRunner
) -> None:
    ids, sampling = prompt(11), SamplingParams(num_logprobs=3)
    columns = runner.execute(make_step(0, [Row(ids, 0, range(5), sampling=sampling)]), no_tick)
    expected = torch.log_softmax(twin.logits(ids)[-1], 0).topk(3)
    assert columns.top_ids.tolist() == [expected.indices.tolist()]
    np.testing.assert_allclose(columns.top_logprobs[0], expected.values.numpy(), atol=1e-4)
    np.testing.assert_allclose(columns.logprobs, columns.top_logprobs[:, 0])


def test_a_step_that_samples_nothing_answers_with_empty_columns(
    twin: Twin, runner: ModelRunner
) -> None:
    ids = prompt(12)
    begun = runner.execute(make_step(0, [Row(ids[:7], 0, range(5), samples=False)]), no_tick)
    assert [len(begun.token_ids), len(begun.logprobs), len(begun.finite)] == [0, 0, 0]
    assert begun.top_ids.shape == begun.top_logprobs.shape
    columns = runner.execute(make_step(1, [Row(ids[7:], 7, range(5))]), no_tick)
    assert columns.token_ids.tolist() == twin.generate(ids, 1)


def test_every_layer_ticks_and_the_halves_of_a_step_are_stamped_in_order(
    runner: ModelRunner,
) -> None:
    ticks: list[int] = []
    begun = time.monotonic_ns()
    columns = runner.execute(
        make_step(0, [Row(prompt(3), 0, [0])]), lambda: ticks.append(time.monotonic_ns())
    )
    assert len(ticks) == 3
    assert begun <= columns.forward_ns <= ticks[0] <= ticks[2] <= columns.sample_ns
    assert columns.sample_ns <= columns.sampled_ns <= time.monotonic_ns()


def test_logits_that_were_asked_for_are_the_model_s_own_whatever_the_row_samples_with(
    twin: Twin, runner: ModelRunner
) -> None:
    ids = [prompt(n, n) for n in (5, 7, 3)]
    odd = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.7)
    rows = [
        Row(ids[0], 0, range(4), sampling=odd),
        Row(ids[1], 0, range(4, 8)),
        Row(ids[2], 0, [8]),
    ]
    step = make_step(0, rows)
    plain = runner.execute(step, no_tick)
    asked = replaced(step, wanted_logits=[2, 0])
    asked.wanted_logits.flags.writeable = False  # as they come out of shared memory
    columns = runner.execute(asked, no_tick)
    assert plain.logits.shape == (0, VOCAB_SIZE)
    assert columns.logits.dtype == np.float32
    for found, wanted in zip(columns.logits, (ids[2], ids[0]), strict=True):
        np.testing.assert_allclose(found, twin.logits(wanted)[-1].numpy(), atol=1e-4)
    assert_same(columns, plain)


def test_the_bare_model_is_timed_and_nothing_of_it_stays(twin: Twin) -> None:
    runner = load(twin.card, max_num_seqs=8)
    assert set(runner.bare_decode_ms) <= {1, 8}
    assert runner.bare_decode_ms[1] > 0
    assert runner.bare_context > 0
    assert runner.step_cost is not None
    assert runner.step_cost.decode_ms(1, 1) > 0
    with pytest.raises(ChannelError, match="step 1 needs the samples of step 0"):
        runner.execute(make_step(1, [Row([0], 3, [0], source=0)]), no_tick)


def test_only_the_row_whose_logits_are_not_finite_is_marked(tmp_path: pathlib.Path) -> None:
    twin = build_twin(tmp_path)
    runner = load(twin.card)
    runner._model.tensors()["model.embed_tokens.weight"][7] = torch.nan
    rows = [Row([1, 2], 0, [0]), Row([3, 7, 5], 0, [1]), Row([6], 0, [2])]
    columns = runner.execute(make_step(0, rows), no_tick)
    assert columns.finite.tolist() == [True, False, True]
    assert ((columns.token_ids >= 0) & (columns.token_ids < VOCAB_SIZE)).all()
    assert columns.token_ids[0] == twin.generate([1, 2], 1)[0]


def test_a_source_counts_only_if_the_step_before_was_the_last_that_finished(
    runner: ModelRunner,
) -> None:
    decode = [Row([0], 3, [0], source=0)]
    with pytest.raises(ChannelError, match="step 5 needs the samples of step 4"):
        runner.execute(make_step(5, decode), no_tick)
    runner.execute(make_step(5, [Row(prompt(3), 0, [0])]), no_tick)
    with pytest.raises(ChannelError, match="step 7 needs the samples of step 6"):
        runner.execute(make_step(7, decode), no_tick)
    with pytest.raises(ChannelError, match="the last step had fewer samples"):
        runner.execute(make_step(6, [Row([0], 3, [0], source=1)]), no_tick)
    runner.execute(make_step(6, decode), no_tick)


def test_a_step_that_fails_is_not_the_last_one_that_finished(runner: ModelRunner) -> None:
    runner.execute(make_step(0, [Row(prompt(3), 0, [0])]), no_tick)
    with pytest.raises(ChannelError):
        runner.execute(make_step(1, [Row([VOCAB_SIZE], 3, [0])]), no_tick)
    with pytest.raises(ChannelError, match="step 2 needs the samples of step 1"):
        runner.execute(make_step(2, [Row([0], 4, [0, 1], source=0)]), no_tick)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"input_ids": [1, 2, VOCAB_SIZE, 4]}, r"input_ids must lie in 0 .. 96, found 1 .. 97"),
        ({"input_ids": [1, 2, -1, 4]}, "input_ids must lie in"),
        ({"input_ids": [1, 2, 3]}, "positions has 4 entries, expected 3"),
        ({"positions": [0, 1, 2, CONTEXT]}, "positions must lie in 0 .. 127"),
        ({"slots": [0, 1, 2, 256]}, "slots must lie in 0 .. 255"),
        ({"slots": [0, 1, 2, -4]}, "slots must lie in"),
        ({"query_starts": [0, 4]}, "query_starts has 2 entries, expected 3"),
        ({"query_starts": [0, 4, 4]}, "query_starts must rise"),
        ({"query_starts": [0, 3, 5]}, "query_starts must rise"),
        ({"query_starts": [1, 3, 4]}, "query_starts must rise"),
        ({"context_lens": [2, 1]}, "context_lens: a row's context is shorter"),
        ({"context_lens": [3, 9]}, "block_tables: a row's context is longer than its blocks"),
        ({"block_tables": [[0], [64]]}, "block_tables must lie in 0 .. 63, found 0 .. 64"),
        ({"block_tables": [[0], [-1]]}, "block_tables must lie in"),
        ({"block_tables": [[0]]}, "block_tables has 1 entries, expected 2"),
        ({"sources": [-1]}, "sources has 1 entries, expected 2"),
        ({"logit_positions": [2, 4]}, "logit_positions must lie in 0 .. 3"),
        ({"logit_positions": [2]}, "logit_positions has 1 entries, expected 2"),
        ({"history_starts": [0, 0]}, "history_starts has 2 entries, expected 3"),
        ({"history_starts": [0, 0, 5]}, "history_starts must rise"),
        ({"history_starts": [0, 1, 1], "history_ids": [VOCAB_SIZE]}, "history_ids must lie"),
        ({"history_prompt_lens": [0]}, "history_prompt_lens has 1 entries, expected 2"),
        ({"bias_rows": [0]}, "bias_ids has 0 entries, expected 1"),
        ({"bias_rows": [0], "bias_ids": [3]}, "bias_values has 0 entries, expected 1"),
        ({"wanted_logits": [9]}, "wanted_logits must lie in 0"),
    ],
)
def test_arrays_that_point_outside_are_refused_before_anything_follows_them(
    runner: ModelRunner, values: dict[str, Any], problem: str
) -> None:
    inputs = make_step(0, [Row([1, 2, 3], 0, [0]), Row([4], 0, [1])])
    with pytest.raises(ChannelError, match=problem):
        runner.execute(replaced(inputs, **values), no_tick)
    runner.execute(inputs, no_tick)


@pytest.mark.parametrize(("name", "limit"), [("bias_rows", 1), ("bias_ids", VOCAB_SIZE)])
def test_a_bias_outside_the_logits_is_refused(runner: ModelRunner, name: str, limit: int) -> None:
    inputs = replaced(make_step(0, [Row([1], 0, [0])]), bias_rows=[0], bias_ids=[0])
    inputs = msgspec.structs.replace(inputs, bias_values=np.ones(1, np.float32))
    runner.execute(inputs, no_tick)
    with pytest.raises(ChannelError, match=f"{name} must lie in 0 .. {limit - 1}"):
        runner.execute(replaced(inputs, **{name: [limit]}), no_tick)


def test_a_warm_runner_gives_what_a_cold_one_gives_and_knows_no_last_step(
    twin: Twin, runner: ModelRunner
) -> None:
    rows = [Row(prompt(9), 0, [3, 1, 0]), Row(prompt(2, 1), 0, [2])]
    first = runner.execute(make_step(0, rows), no_tick)
    runner.warm_up()
    with pytest.raises(ChannelError, match="step 1 needs the samples of step 0"):
        runner.execute(make_step(1, [Row([0], 1, [0], source=0)]), no_tick)
    assert_same(runner.execute(make_step(0, rows), no_tick), first)


def test_a_step_says_how_far_it_writes_before_it_does(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, reached = load(twin.card), list[int]()
    writing = KvCache.writing

    def said(cache: KvCache, slot: int) -> AbstractContextManager[None]:
        reached.append(slot)
        return writing(cache, slot)

    monkeypatch.setattr(KvCache, "writing", said)
    rows = [Row([1, 2], 0, [3]), Row([5], 0, [1])]
    runner.execute(make_step(0, rows), no_tick)
    assert reached == [3 * BLOCK_SIZE + 1]


def test_columns_do_not_change_when_the_next_step_runs(runner: ModelRunner) -> None:
    sampling = SamplingParams(num_logprobs=2)
    first = runner.execute(make_step(0, [Row([1], 0, [0], sampling=sampling)]), no_tick)
    kept = dataclasses.replace(
        first, **{f: getattr(first, f).copy() for f in ("token_ids", "logprobs", "top_logprobs")}
    )
    runner.execute(make_step(1, [Row([9, 4], 0, [1], sampling=sampling)]), no_tick)
    assert_same(first, kept)


def test_loading_tells_its_phases_and_what_it_found(twin: Twin) -> None:
    phases: list[str] = []
    runner = load(twin.card, phases, num_blocks=None, device="auto")
    assert phases == ["read weights", "allocate KV cache", "warm up", "time the bare model"]
    assert runner.num_blocks == 8 * CONTEXT // BLOCK_SIZE
    assert runner.block_size == BLOCK_SIZE
    assert (runner.vocab_size, runner.dtype) == (VOCAB_SIZE, "float32")
    assert runner.kv_dtype == "float32"
    assert runner.device in ("cpu", "cuda", "cuda:0")
    assert set(runner.kernels.values()) == {"reference"}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_model_len": 1, "num_blocks": None},
        {"block_size": 200},
    ],
)
def test_any_limit_of_at_least_one_starts_and_serves(twin: Twin, limits: dict[str, Any]) -> None:
    runner = load(twin.card, **limits)
    columns = runner.execute(make_step(0, [Row([5], 0, [0])]), no_tick)
    assert columns.token_ids.tolist() == twin.generate([5], 1)


@pytest.mark.parametrize(
    ("config", "settings", "problem"),
    [
        ({"sliding_window": 64}, {}, "sliding_window: served only up to 64 tokens"),
        ({}, {"max_model_len": 129}, "max_model_len: 129 is more than the model's 128"),
        ({"num_key_value_heads": 4}, {}, "num_key_value_heads: 4 does not divide .* 6"),
        ({"num_hidden_layers": 4}, {}, "lacks model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, {}, "model.layers.2.* has no place"),
        ({}, {"device": "gpu"}, "device: expected auto, cpu or cuda, found 'gpu'"),
        ({}, {"num_blocks": 10**13}, "kv_cache.num_blocks: "),
        ({}, {"kv_dtype": "int8"}, "kv_cache.dtype: int8 needs the native kernels"),
        ({}, {"kv_dtype": "int4"}, "kv_cache.dtype: expected one of auto, int8, found 'int4'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_the_name_of_its_field(
    twin: Twin, config: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    changed = msgspec.structs.replace(twin.card.config, **config)
    with pytest.raises(ConfigError, match=problem):
        load(msgspec.structs.replace(twin.card, config=changed), **settings)


def test_a_card_of_another_release_is_refused(twin: Twin) -> None:
    with pytest.raises(ConfigError, match="version: the card is of version 0, this release reads"):
        load(msgspec.structs.replace(twin.card, version=0))


def test_a_sliding_window_that_is_never_full_changes_nothing(twin: Twin) -> None:
    changed = msgspec.structs.replace(twin.card.config, sliding_window=64)
    runner = load(msgspec.structs.replace(twin.card, config=changed), max_model_len=64)
    columns = runner.execute(make_step(0, [Row([5], 0, [0])]), no_tick)
    assert columns.token_ids.tolist() == twin.generate([5], 1)
