"""What one step costs on its way to the agent and back: microseconds, median (and 90 %).

    python benchmarks/transport_round_trip.py

A real agent process around a runner that computes nothing, on the event loop of the server.  A
step is 32 decode rows at a context of 4,096 tokens: its arrays into shared memory, one frame out,
read by the agent, results into shared memory, one frame back, the future resolved.  Beside it the
bare ping, and the parts of a step as both sides see them.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import uvloop

from llm_serving.agent.agent_process import AgentSettings, run_agent
from llm_serving.config import AgentConfig
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost
from llm_serving.transport.address import parse_address
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.launcher import Launcher

NUM_ROWS, CONTEXT, BLOCK_SIZE, NUM_STEPS = 32, 4096, 16, 2000


@dataclass
class Columns:
    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    finite: np.ndarray
    logits: np.ndarray
    forward_ns: int = 0
    sample_ns: int = 0
    sampled_ns: int = 0


class NoModel:
    num_blocks, block_size, vocab_size = 64, BLOCK_SIZE, 32000
    dtype = kv_dtype = "float32"
    device = "cpu"

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        floats, none = np.zeros(NUM_ROWS, np.float32), np.zeros((NUM_ROWS, 0), np.int32)
        finite = np.ones(NUM_ROWS, np.bool_)
        ids = np.arange(NUM_ROWS, dtype=np.int32)
        no_floats = none.astype(np.float32)
        self._columns = Columns(ids, floats, none, no_floats, finite, no_floats[:0])
        self.bare_context, self.bare_decode_ms = 0, dict[int, float]()
        self.step_cost: StepCost | None = None

    def execute(self, inputs: StepInputs, tick: Callable[[], None]) -> Columns:
        self._columns.forward_ns = time.monotonic_ns()
        self._columns.sample_ns = time.monotonic_ns()
        self._columns.sampled_ns = time.monotonic_ns()
        return self._columns


def agent(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("rank", "key-fd", "epoch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--address", type=parse_address)
    given = parser.parse_args(argv)
    settings = AgentSettings(given.rank, given.epoch, given.address, given.key_fd, CONTEXT, 1)
    return run_agent(settings, lambda phase: NoModel())


def decode_step(step_id: int) -> StepInputs:
    rows = np.arange(NUM_ROWS, dtype=np.int32)
    none, zeros = np.empty(0, np.int32), np.zeros(NUM_ROWS, np.int32)
    return StepInputs(
        step_id=step_id,
        input_ids=rows,
        positions=rows,
        slots=rows,
        query_starts=np.arange(NUM_ROWS + 1, dtype=np.int32),
        context_lens=np.full(NUM_ROWS, CONTEXT, np.int32),
        block_tables=np.zeros((NUM_ROWS, CONTEXT // BLOCK_SIZE), np.int32),
        sources=np.full(NUM_ROWS, -1, np.int32),
        adapter_ids=zeros,
        logit_positions=rows,
        sampling=np.frombuffer(SamplingParams().record() * NUM_ROWS, SAMPLING_DTYPE),
        history_starts=np.zeros(NUM_ROWS + 1, np.int32),
        history_ids=none,
        history_prompt_lens=zeros,
        bias_rows=none,
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
        wanted_logits=none,
    )


async def measure(transport: Literal["tcp", "unix"]) -> dict[str, list[float]]:
    """Microseconds of every step, and of its parts."""
    launcher = Launcher(
        [sys.executable, __file__, "agent"], AgentConfig(transport=transport), on_event=print
    )
    worker = AgentWorker(
        launcher,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=2048,
        max_model_len=CONTEXT,
        block_size=BLOCK_SIZE,
    )
    spent: dict[str, list[float]] = {name: [] for name in ("step", "submit", "agent", "answer")}
    await worker.start()
    try:
        spent["ping"] = [float(str(worker.describe()[0]["round_trip_us"]))]
        for step_id in range(NUM_STEPS):
            inputs = decode_step(step_id)
            start = time.monotonic_ns()
            future = worker.submit(inputs)
            sent = time.monotonic_ns()
            times = (await future).times
            end = time.monotonic_ns()
            spent["step"].append((end - start) / 1000)
            spent["submit"].append((sent - start) / 1000)
            spent["agent"].append((times.done - times.received) / 1000)
            spent["answer"].append((end - times.done) / 1000)
    finally:
        await worker.close()
    return spent


def main() -> None:
    print(f"{NUM_ROWS} decode rows, context {CONTEXT}, {NUM_STEPS} steps: median (90 %) us")
    transports: tuple[Literal["tcp"], Literal["unix"]] = ("tcp", "unix")
    for transport in transports:
        spent = uvloop.run(measure(transport))
        print(f"{transport}: ping {spent.pop('ping')[0]:.0f}")
        for name, us in spent.items():
            ninetieth = statistics.quantiles(us, n=10)[-1]
            print(f"  {name:8}{statistics.median(us):8.1f}  ({ninetieth:.1f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["agent"]:
        sys.exit(agent(sys.argv[2:]))
    main()
