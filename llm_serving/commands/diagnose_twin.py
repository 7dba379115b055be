"""The agent that `llm-serving diagnose` talks to: a real one in all but the model.

    python -m llm_serving.commands.diagnose_twin --rank 0 --key-fd 5 --address ... --epoch 1

It runs the agent's own loop over the FakeAgent of `testing`, whose tokens are known beforehand.
Step FAILING_STEP fails on purpose; `--break-at N` breaks another one, for tests of the diagnosis.
Every error of its own is printed with its traceback, which the diagnosis shows.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from llm_serving.agent.watchdog import MASTER_IS_GONE, end_with_master, read_key
from llm_serving.agent.work_agent import WorkAgent
from llm_serving.errors import AgentDied
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.protocol import Command, Ready, Reply
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost
from llm_serving.step_packing import INPUT_NAMES
from llm_serving.testing import FakeAgent
from llm_serving.transport.address import parse_address
from llm_serving.transport.blocking import BlockingChannel
from llm_serving.transport.handshake import Hello

__all__ = ["FAILING_STEP", "TWIN", "main", "twin_step"]

TWIN = (sys.executable, "-m", "llm_serving.commands.diagnose_twin")
FAILING_STEP = 2
_NUM_BLOCKS, _BLOCK_SIZE, _CONTEXT, _VOCABULARY = 4, 16, 64, 50
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


@dataclass(frozen=True, slots=True)
class _Columns:
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]
    logits: npt.NDArray[np.float32]
    forward_ns: int
    sample_ns: int
    sampled_ns: int


class _FakeRunner:
    """A FakeAgent as an agent's runner; in two steps it fails."""

    num_blocks, block_size, vocab_size = _NUM_BLOCKS, _BLOCK_SIZE, _VOCABULARY
    dtype = kv_dtype = "float32"
    device = "cpu"
    bare_context = 0
    step_cost: StepCost | None = None

    def __init__(self, break_at: int | None) -> None:
        self.kernels: dict[str, str] = {}
        self.bare_decode_ms: dict[int, float] = {}
        self._agent = FakeAgent(_NUM_BLOCKS, _BLOCK_SIZE)
        self._break_at = break_at

    def execute(self, inputs: StepInputs, tick: Callable[[], None]) -> _Columns:
        forward_ns = time.monotonic_ns()
        if inputs.step_id == FAILING_STEP:
            raise RuntimeError("this step was told to fail")
        if inputs.step_id == self._break_at:
            raise RuntimeError("this step was broken by --break-at")
        ids = np.array(self._agent.execute(inputs), np.int32)
        tick()
        none = np.zeros((len(ids), 0), np.int32)
        now_ns = time.monotonic_ns()
        return _Columns(
            ids,
            np.zeros(len(ids), np.float32),
            none,
            none.astype(np.float32),
            np.ones(len(ids), np.bool_),
            np.zeros((0, _VOCABULARY), np.float32),
            forward_ns,
            now_ns,
            now_ns,
        )


def twin_step(step_id: int) -> StepInputs:
    """A prompt of three tokens whose last one samples."""
    row, zero = np.arange(3, dtype=np.int32), np.zeros(1, np.int32)
    given: dict[str, Any] = {
        "input_ids": row + np.int32(7),
        "positions": row,
        "slots": row,
        "query_starts": np.array([0, 3], np.int32),
        "context_lens": np.array([3], np.int32),
        "block_tables": np.zeros((1, 1), np.int32),
        "sources": zero - np.int32(1),
        "adapter_ids": zero,
        "logit_positions": np.array([2], np.int32),
        "sampling": np.frombuffer(SamplingParams().record(), SAMPLING_DTYPE),
        "history_starts": np.zeros(2, np.int32),
        "history_prompt_lens": zero,
        "bias_values": np.empty(0, np.float32),
    }
    for name in set(INPUT_NAMES) - given.keys():
        given[name] = np.empty(0, np.int32)
    return StepInputs(step_id, **given)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("rank", "key-fd", "epoch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", type=parse_address, required=True)
    parser.add_argument("--break-at", type=int)
    given = parser.parse_args(argv)
    key = read_key(given.key_fd)
    end_with_master(given.key_fd)
    channel = BlockingChannel[Reply, Command].connect(
        given.address, key, Hello.of(given.rank), _COMMANDS
    )
    try:
        runner = _FakeRunner(given.break_at)
        channel.send(_ready(given.rank, given.epoch, runner))
        WorkAgent(channel, runner, given.epoch).serve()
    except AgentDied:
        return MASTER_IS_GONE
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        channel.close()
    return 0


def _ready(rank: int, epoch: int, runner: _FakeRunner) -> Ready:
    return Ready(
        rank,
        epoch,
        runner.num_blocks,
        runner.block_size,
        runner.vocab_size,
        _CONTEXT,
        runner.dtype,
        runner.device,
        {},
        {},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
