"""Requests through a scheduler and a model in this very process, with every logit and token seen.

No HTTP, no agent process: what is to be proved is that logits depend on nothing but the tokens
before them, and a token on nothing but that and how it is chosen; scheduling and arithmetic alone
decide it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_serving.agent.model_runner import ModelRunner, StepColumns
from llm_serving.determinism.seen import Digests, Seen, digest
from llm_serving.generation import SamplingParams
from llm_serving.master.block_pool import BlockPool
from llm_serving.master.logits_sink import give_logits
from llm_serving.master.request import Request
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.master.step import Step
from llm_serving.master.step_inputs import StepInputBuilder
from llm_serving.protocol import StepTimes
from llm_serving.step_arrays import StepInputs, StepResult

__all__ = ["LONG_CONTEXT", "Counts", "Prompt", "run_requests"]

LONG_CONTEXT = 512  # attention over more may be split into parts, see attention_plan.cpp


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    sampling: SamplingParams
    arrives: int = 0  # the step before which it is submitted

    @property
    def is_plain(self) -> bool:
        """Whether it asks for the likeliest ids alone: for those a step needs no logits."""
        return self.sampling.temperature == 0 and not self.sampling.num_logprobs


@dataclass(slots=True)
class Counts:
    """What the scheduler was forced to do: a run that forced nothing proves nothing."""

    steps: int = 0
    rows: int = 0
    mixed_steps: int = 0  # with prompt chunks and decode rows
    preemptions: int = 0
    prefix_hits: int = 0  # tokens
    long_contexts: int = 0  # decode rows that see more than LONG_CONTEXT tokens
    ahead: int = 0  # rows whose input was still being sampled when they were scheduled
    tokens: int = 0
    logits: int = 0  # rows of logits that were seen
    unkept: int = 0  # tokens of steps whose logits were never written to memory


class _Sink:
    """A `LogitsSink` that keeps a digest of every position."""

    every = 1

    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    def take(
        self, token_ids: npt.NDArray[np.int32], position: int, logits: npt.NDArray[np.float32]
    ) -> None:
        self._digests.add(digest(token_ids.tobytes()), digest(logits.tobytes()), position)

    def has_room(self) -> bool:
        return True

    def on_room(self, call: Callable[[], None]) -> None:
        pass


def run_requests(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    limits: Limits,
    seen: Seen,
    *,
    num_blocks: int,
    depth: int,
    wants_logits: bool,
    advance: Callable[[int], None],
) -> Counts:
    """Serve all prompts to their ends and add what came out to `seen`.

    A step is credited once `depth` steps are scheduled that were not yet, as `AsyncMaster` does.
    Without `wants_logits` steps keep what they keep for users, and only tokens are seen.
    `advance` is called with the number of tokens that came out.
    """
    scheduler = Scheduler(BlockPool(num_blocks, runner.block_size), limits)
    builder = StepInputBuilder(runner.block_size, logits_every=1 if wants_logits else None)
    counts, sink = Counts(), _Sink(seen.logits)
    flights: deque[tuple[Step, StepResult]] = deque()
    pending = sorted(range(len(prompts)), key=lambda i: (prompts[i].arrives, i))
    while pending or scheduler.open_requests:
        while pending and (
            prompts[pending[0]].arrives <= counts.steps or not scheduler.open_requests
        ):
            i = pending.pop(0)
            scheduler.add(Request(str(i), prompts[i].ids, prompts[i].sampling))
        if (step := scheduler.schedule()) is not None:
            inputs = builder.build(step)
            flights.append((step, _execute(runner, inputs)))
            _count(counts, step, is_kept=runner.keeps_logits(inputs))
        assert flights, "requests are open and nothing can run"
        if step is not None and len(flights) < depth:
            continue
        step, result = flights.popleft()
        if wants_logits:
            give_logits(step, result, sink)
            counts.logits += len(result.logits)
        num_tokens = _take_tokens(step, result, seen.tokens)
        scheduler.update(step, result)
        counts.tokens += num_tokens
        advance(num_tokens)
    counts.preemptions, counts.prefix_hits = scheduler.num_preemptions, scheduler.num_prefix_hits
    return counts


def _execute(runner: ModelRunner, inputs: StepInputs) -> StepResult:
    columns: StepColumns = runner.execute(inputs, _ignore_tick)
    return StepResult(
        inputs.step_id,
        0,
        columns.token_ids,
        columns.logprobs,
        columns.top_ids,
        columns.top_logprobs,
        columns.finite,
        columns.logits,
        StepTimes(),
    )


def _take_tokens(step: Step, result: StepResult, digests: Digests) -> int:
    """How many there are; to be called before the step's result is credited, as `give_logits`."""
    num_tokens = 0
    for i, row in enumerate(step.samplers):
        if row.epoch != row.request.epoch:
            continue  # it will be computed again
        num_tokens += 1
        known, record = row.start + row.num_tokens, row.request.sampling_record
        ids = row.request.token_ids.view()[:known].tobytes()
        num_top = row.request.sampling.num_logprobs
        own = slice(i, i + 1)
        value = (
            result.token_ids[own],
            result.logprobs[own],
            result.finite[own],
            result.top_ids[i, :num_top],
            result.top_logprobs[i, :num_top],
        )
        digests.add(digest(ids, record), digest(*(part.tobytes() for part in value)), known - 1)
    return num_tokens


def _count(counts: Counts, step: Step, *, is_kept: bool) -> None:
    lengths = [row.num_tokens for row in step.rows]
    counts.steps += 1
    counts.rows += len(lengths)
    counts.mixed_steps += min(lengths) == 1 and max(lengths) > 1
    counts.long_contexts += sum(r.num_tokens == 1 and r.start >= LONG_CONTEXT for r in step.rows)
    counts.ahead += sum(row.source >= 0 for row in step.rows)
    counts.unkept += 0 if is_kept else len(step.samplers)


def _ignore_tick() -> None:
    pass
