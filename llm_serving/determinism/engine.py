"""Requests through a scheduler and a model in this very process, with every logit and token seen.

No HTTP, no agent process: what is to be proved is that logits depend on nothing but the tokens
before them, and a token on nothing but that and how it is chosen; scheduling and arithmetic alone
decide it.
"""

from __future__ import annotations

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

__all__ = ["Counts", "Prompt", "run_requests"]


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
    wants_logits: bool,
    advance: Callable[[int], None],
) -> Counts:
    """Serve all prompts to their ends and add what came out to `seen`.

    Without `wants_logits` steps keep what they keep for users, and only tokens are seen.
    `advance` is called with the number of tokens that came out.
    """
    scheduler = Scheduler(BlockPool(num_blocks, runner.block_size), limits)
    builder = StepInputBuilder(runner.block_size, logits_every=1 if wants_logits else None)
    counts, sink = Counts(), _Sink(seen.logits)
    pending = sorted(range(len(prompts)), key=lambda i: (prompts[i].arrives, i))
    while pending or scheduler.open_requests:
        while pending and (
            prompts[pending[0]].arrives <= counts.steps or not scheduler.open_requests
        ):
            i = pending.pop(0)
            scheduler.add(Request(str(i), prompts[i].ids, prompts[i].sampling))
        step = scheduler.schedule()
        assert step is not None, "requests are open and nothing can run"
        inputs = builder.build(step)
        result = _execute(runner, inputs)
        if wants_logits:
            give_logits(step, result, sink)
        _take_tokens(step, result, seen.tokens)
        scheduler.update(step, result)
        _count(counts, step, is_kept=runner.keeps_logits(inputs))
        counts.logits += len(result.logits)
        advance(len(step.samplers))
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


def _take_tokens(step: Step, result: StepResult, digests: Digests) -> None:
    """To be called before the step's result is credited, as `give_logits`."""
    for i, row in enumerate(step.samplers):
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


def _count(counts: Counts, step: Step, *, is_kept: bool) -> None:
    lengths = [row.num_tokens for row in step.rows]
    counts.steps += 1
    counts.rows += len(lengths)
    counts.mixed_steps += min(lengths) == 1 and max(lengths) > 1
    counts.tokens += len(step.samplers)
    counts.unkept += 0 if is_kept else len(step.samplers)


def _ignore_tick() -> None:
    pass
