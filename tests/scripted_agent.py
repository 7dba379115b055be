"""A real agent process around a runner that follows a script: what tests start instead of a model.

    python tests/scripted_agent.py --rank 0 --key-fd 5 ... --script '{"fail_at": [3]}'

A sampled id is the sampled token's own id plus one plus 100 times the rank, plus the sample it was
told to take from the step before.  Lines that begin with "in " tell the test where it is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_serving.agent.agent_process import AgentSettings, run_agent
from llm_serving.errors import ConfigError, InvalidRequest
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost
from llm_serving.transport.address import parse_address

FOR_EVER_S = 3600.0
NUM_LOGITS = 8


@dataclass
class Script:
    """Step ids at which something happens, in the epochs of `epochs` (empty: in all)."""

    epochs: list[int] = field(default_factory=list)
    hang_at: list[int] = field(default_factory=list)
    spin_at: list[int] = field(default_factory=list)
    fail_at: list[int] = field(default_factory=list)
    break_at: list[int] = field(default_factory=list)
    exit_at: list[int] = field(default_factory=list)
    exit_in_results_at: list[int] = field(default_factory=list)
    odd_results_at: list[int] = field(default_factory=list)
    hang_at_start: bool = False
    exit_at_start: int = 0
    refuse_start: str = ""
    break_start: str = ""
    ignore_term: bool = False


@dataclass
class Columns:
    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    finite: np.ndarray
    logits: np.ndarray
    forward_ns: int
    sample_ns: int
    sampled_ns: int


class FatalColumns(Columns):
    """Ends the process when the results are half written."""

    def __getattribute__(self, name: str) -> Any:
        if name == "finite":
            os._exit(8)
        return super().__getattribute__(name)


class ScriptedRunner:
    num_blocks = 64
    block_size = 16
    vocab_size = 32000
    dtype = kv_dtype = "float32"
    device = "cpu"

    def __init__(self, script: Script, rank: int) -> None:
        self.kernels = {"linear": "scripted"}
        self.num_blocks = 64 - rank
        self.bare_context, self.bare_decode_ms = 64, {1: 0.5}
        self.step_cost: StepCost | None = StepCost(1.0, 0.5, 0.25, 0.5, 0.25)
        self._script = script
        self._rank = rank
        self._last = np.empty(0, np.int32)

    def execute(self, inputs: StepInputs, tick: Callable[[], None]) -> Columns:
        forward_ns = time.monotonic_ns()
        tick()
        self._act(inputs.step_id)
        tick()
        ids = inputs.input_ids.copy()
        taken = inputs.sources >= 0
        ids[inputs.query_starts[:-1][taken]] = self._last[inputs.sources[taken]]
        sampled = (ids[inputs.logit_positions] + 1 + 100 * self._rank).astype(np.int32)
        self._last = sampled
        width = int(inputs.sampling["num_logprobs"].max(initial=0))
        tops = np.tile(np.arange(width, dtype=np.int32), (len(sampled), 1))
        is_odd = inputs.step_id in self._script.odd_results_at
        is_fatal = inputs.step_id in self._script.exit_in_results_at
        return (FatalColumns if is_fatal else Columns)(
            token_ids=sampled,
            logprobs=np.negative(sampled, dtype=np.float64 if is_odd else np.float32),
            top_ids=tops,
            top_logprobs=-tops.astype(np.float32),
            finite=np.ones(len(sampled), np.bool_),
            logits=np.tile(sampled[inputs.wanted_logits, None], (1, NUM_LOGITS)).astype(np.float32),
            forward_ns=forward_ns,
            sample_ns=time.monotonic_ns(),
            sampled_ns=time.monotonic_ns(),
        )

    def _act(self, step_id: int) -> None:
        script = self._script
        if step_id in script.hang_at:
            print(f"in step {step_id}", flush=True)
            time.sleep(FOR_EVER_S)
        if step_id in script.spin_at:
            print(f"in step {step_id}", flush=True)
            while True:
                sum(range(1000))
        if step_id in script.fail_at:
            raise InvalidRequest(f"step {step_id} was to fail")
        if step_id in script.break_at:
            raise RuntimeError(f"step {step_id} was to break")
        if step_id in script.exit_at:
            print(f"leaving at step {step_id}", flush=True)
            os._exit(7)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("rank", "key-fd", "epoch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--script", default="{}")
    given = parser.parse_args()
    script = Script(**json.loads(given.script))
    if script.epochs and given.epoch not in script.epochs:
        script = Script()
    if script.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def load(phase: Callable[[str], None]) -> ScriptedRunner:
        phase("read weights")
        if script.refuse_start:
            raise ConfigError(script.refuse_start)
        if script.break_start:
            raise RuntimeError(script.break_start)
        if script.hang_at_start:
            print("in start", flush=True)
            time.sleep(FOR_EVER_S)
        if script.exit_at_start:
            print("these weights are not mine", file=sys.stderr, flush=True)
            os._exit(script.exit_at_start)
        return ScriptedRunner(script, given.rank)

    settings = AgentSettings(
        given.rank, given.epoch, parse_address(given.address), given.key_fd, 4096, 1
    )
    return run_agent(settings, load)


if __name__ == "__main__":
    sys.exit(main())
