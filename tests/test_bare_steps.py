"""Is the cost of steps what the steps cost?  On a machine whose clock the test owns."""

from __future__ import annotations

import random
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from llm_serving.agent import bare_steps
from llm_serving.agent.bare_steps import BareSteps, Shape, time_bare_steps
from llm_serving.agent.step_check import StepLimits, check_step
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost

TRUTH = StepCost(base_ms=3.0, row_ms=0.4, row_context_ms=0.5, token_ms=0.2, token_context_ms=0.1)
LIMITS = StepLimits(vocab_size=100, max_model_len=8192, num_blocks=64, block_size=16)


class Machine:
    """Steps take exactly what `cost` says, and the calls in `disturbed` five times as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: StepCost = TRUTH) -> None:
        self.cost = cost
        self.seen: list[Shape] = []
        self.disturbed: set[int] = set()
        self.floor_ms = 0.0  # no step takes less
        self._now_s = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self._now_s, perf_counter=lambda: self._now_s)
        monkeypatch.setattr(bare_steps, "time", clock)

    def execute(self, inputs: StepInputs, limits: StepLimits) -> None:
        check_step(inputs, limits)
        counts = np.diff(inputs.query_starts)
        shape = Shape(len(counts), int(inputs.positions[0]), int(counts[0]))
        assert inputs.positions[-1] == shape.start + shape.num_tokens - 1
        assert inputs.context_lens.tolist() == [shape.start + shape.num_tokens] * shape.num_rows
        contexts = shape.num_rows * (shape.start + 1)
        ms = self.cost.decode_ms(shape.num_rows, contexts)
        if shape.num_tokens > 1:
            ms = self.cost.base_ms + self.cost.chunk_ms(shape.start, shape.num_tokens)
        ms = max(ms, self.floor_ms)
        self._now_s += ms * (5 if len(self.seen) in self.disturbed else 1) / 1e3
        self.seen.append(shape)

    def time(self, limits: StepLimits = LIMITS, seqs: int = 64, tokens: int = 512) -> BareSteps:
        return time_bare_steps(lambda inputs: self.execute(inputs, limits), limits, seqs, tokens)


def assert_near(found: StepCost, wanted: StepCost) -> None:
    for name in StepCost.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-6), name


def test_the_cost_of_a_machine_that_is_as_modelled_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = Machine(monkeypatch).time()
    assert_near(bare.cost, TRUTH)
    assert bare.decode_ms == pytest.approx(
        {n: TRUTH.decode_ms(n, n * 192) for n in (1, 8, 32)}, rel=1e-6
    )


def test_a_moment_in_which_others_compute_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.disturbed = set(range(7, 14))
    assert_near(machine.time().cost, TRUTH)


def test_on_a_slow_machine_little_is_timed_and_the_rest_leaves_prompts_a_small_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = StepCost(*(1000 * ms for ms in (3.0, 0.4, 0.5, 0.2, 0.1)))
    machine = Machine(monkeypatch, slow)
    cost = machine.time().cost
    assert machine.seen == [(1, 191, 1), (1, 0, 32)]
    assert cost.row_ms == cost.row_context_ms == 0
    assert cost.decode_ms(8, 8 * 1000) < slow.decode_ms(8, 8 * 1000)
    for start in (0, 1000, 8000):
        assert cost.chunk_ms(start, 32) > 0.9 * slow.chunk_ms(start, 32)


def test_whatever_was_timed_the_cost_keeps_to_it_and_the_master_can_read_it() -> None:
    rnd = random.Random(0)
    for _ in range(300):
        chunk = rnd.randrange(2, 600)
        first, eight = Shape(1, 0, chunk), Shape(8, 191)
        shapes = [Shape(1, 191), eight, Shape(8, 2048), first, Shape(1, 2048, chunk)]
        spent_ms = {shape: [rnd.random() ** 3 * 99] for shape in shapes}
        cost = BareSteps(192, chunk, 2048, spent_ms).cost
        assert msgspec.convert(msgspec.to_builtins(cost), StepCost) == cost
        assert cost.decode_ms(8, 8 * 192) <= spent_ms[eight][0] * 8 / 7 + 1e-9
        assert cost.base_ms + cost.chunk_ms(0, chunk) == pytest.approx(spent_ms[first][0])


def test_a_model_without_long_contexts_is_not_timed_at_any(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    cost = machine.time(StepLimits(100, 270, 64, 16)).cost
    assert max(shape.start for shape in machine.seen) == 191
    assert cost.token_context_ms == pytest.approx(cost.token_ms)


def test_nothing_is_begun_after_the_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, StepCost(30, 4, 5, 2, 1))
    machine.time()
    spent_ms = (machine._now_s - 1000) * 1e3
    assert bare_steps.BUDGET_S * 1e3 <= spent_ms <= bare_steps.BUDGET_S * 1e3 + 200


def test_no_longer_chunk_is_begun_after_the_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, StepCost(0, 0, 0, 0.05, 0))
    machine.floor_ms = 300.0
    bare = machine.time()
    assert machine.seen == [(1, 191, 1), (1, 0, 32), (1, 0, 64)], "the last from 600 to 900 ms"
    assert bare.chunk == 64
    assert bare.cost.chunk_ms(0, 64) == pytest.approx(300.0), "what is not known counts as dear"


def test_where_short_chunks_cost_what_the_weights_cost_longer_ones_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, StepCost(0, 0, 0, 0.05, 0))
    machine.floor_ms = 8.0
    bare = machine.time()
    assert bare.chunk == 512
    assert bare.cost.tokens_within(8.0, 0) <= 512


@pytest.mark.parametrize(
    ("limits", "seqs", "tokens"),
    [
        (StepLimits(100, 1, 1, 1), 1, 1),
        (StepLimits(100, 1, 64, 16), 8, 64),
        (StepLimits(100, 8192, 1, 16), 64, 512),
        (StepLimits(100, 8192, 3, 4), 64, 512),
        (StepLimits(100, 8192, 64, 200), 4, 3),
        (StepLimits(100, 300, 64, 16), 2, 512),
        (StepLimits(100, 290, 64, 7), 64, 1),
    ],
)
def test_every_limit_is_kept_and_gives_a_cost(
    monkeypatch: pytest.MonkeyPatch, limits: StepLimits, seqs: int, tokens: int
) -> None:
    machine = Machine(monkeypatch)
    cost = machine.time(limits, seqs, tokens).cost
    assert all(shape.num_rows <= seqs for shape in machine.seen)
    assert all(shape.num_rows * shape.num_tokens <= tokens for shape in machine.seen)
    assert msgspec.convert(msgspec.to_builtins(cost), StepCost) == cost, "as it comes out of Ready"
    assert cost.decode_ms(1, 1) > 0
