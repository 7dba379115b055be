"""Requests through a scheduler and a model in this very process, with every logit seen.

No HTTP, no agent process: what is to be proved is that a token's logits depend on nothing but the
tokens before it, and that is decided by scheduling and arithmetic alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_serving.agent.model_runner import ModelRunner, StepColumns
from llm_serving.generation import SamplingParams
from llm_serving.master.block_pool import BlockPool
from llm_serving.master.logits_sink import give_logits
from llm_serving.master.request import Request
from llm_serving.master.scheduler import Limits, Scheduler
from llm_serving.master.step import Step
from llm_serving.master.step_inputs import StepInputBuilder
from llm_serving.protocol import StepTimes
from llm_serving.step_arrays import StepResult

__all__ = ["Counts", "Prompt", "Seen", "run_requests"]


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    sampling: SamplingParams
    arrives: int = 0  # the step before which it is submitted


@dataclass(slots=True)
class Seen:
    """Digest of the ids up to a position -> digest of the logits there (float32 bytes).

    Two requests with the same ids must agree, too: a second digest is a conflict.
    """

    logits: dict[bytes, bytes] = field(default_factory=dict)
    positions: dict[bytes, int] = field(default_factory=dict)
    conflicts: list[int] = field(default_factory=list)  # positions


@dataclass(slots=True)
class Counts:
    """What the scheduler was forced to do: a run that forced nothing proves nothing."""

    steps: int = 0
    rows: int = 0
    mixed_steps: int = 0  # with prompt chunks and decode rows
    preemptions: int = 0
    prefix_hits: int = 0  # tokens


class _Sink:
    """A `LogitsSink` that keeps digests of every position."""

    every = 1

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def take(
        self, token_ids: npt.NDArray[np.int32], position: int, logits: npt.NDArray[np.float32]
    ) -> None:
        prefix, values = _digest(token_ids), _digest(logits)
        if self._seen.logits.setdefault(prefix, values) != values:
            self._seen.conflicts.append(position)
        self._seen.positions[prefix] = position

    def has_room(self) -> bool:
        return True

    def on_room(self, call: Callable[[], None]) -> None:
        pass


def _digest(array: npt.NDArray[Any]) -> bytes:
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def run_requests(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    limits: Limits,
    *,
    num_blocks: int,
    advance: Callable[[int], None],
) -> tuple[Seen, Counts]:
    """Serve all prompts to their ends.  `advance` is called with the tokens that came out."""
    scheduler = Scheduler(BlockPool(num_blocks, runner.block_size), limits)
    builder = StepInputBuilder(runner.block_size, logits_every=1)
    seen, counts = Seen(), Counts()
    sink = _Sink(seen)
    pending = sorted(range(len(prompts)), key=lambda i: (prompts[i].arrives, i))
    while pending or scheduler.open_requests:
        while pending and (
            prompts[pending[0]].arrives <= counts.steps or not scheduler.open_requests
        ):
            i = pending.pop(0)
            scheduler.add(Request(str(i), prompts[i].ids, prompts[i].sampling))
        step = scheduler.schedule()
        assert step is not None, "requests are open and nothing can run"
        result = _execute(runner, builder, step)
        give_logits(step, result, sink)
        scheduler.update(step, result)
        _count(counts, step)
        advance(len(step.samplers))
    counts.preemptions, counts.prefix_hits = scheduler.num_preemptions, scheduler.num_prefix_hits
    return seen, counts


def _execute(runner: ModelRunner, builder: StepInputBuilder, step: Step) -> StepResult:
    columns: StepColumns = runner.execute(builder.build(step), _ignore_tick)
    return StepResult(
        step.step_id,
        0,
        columns.token_ids,
        columns.logprobs,
        columns.top_ids,
        columns.top_logprobs,
        columns.finite,
        columns.logits,
        StepTimes(),
    )


def _count(counts: Counts, step: Step) -> None:
    lengths = [row.num_tokens for row in step.rows]
    counts.steps += 1
    counts.rows += len(lengths)
    counts.mixed_steps += min(lengths) == 1 and max(lengths) > 1


def _ignore_tick() -> None:
    pass
