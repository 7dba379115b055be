"""A worker around scripted agents, everything to look at it, and the steps to send it."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from llm_serving.config import AgentConfig
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.step_arrays import StepInputs
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.launcher import Launcher
from llm_serving.worker.traffic import Traffic
from tests.scripted_agent import NUM_LOGITS

__all__ = [
    "SCRIPTED",
    "START_S",
    "Deployment",
    "Events",
    "lives",
    "segments",
    "sources",
    "step",
    "until",
]

SHM = pathlib.Path("/dev/shm")
SCRIPTED = [sys.executable, str(pathlib.Path(__file__).with_name("scripted_agent.py"))]
START_S = 30.0  # a bound for a test that goes wrong, not a wait


class Events:
    """What the launcher says, and an await for a line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._came = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._came.set()

    async def has(self, text: str) -> str:
        async with asyncio.timeout(START_S):
            while not (found := [line for line in self.lines if text in line]):
                self._came.clear()
                await self._came.wait()
        return found[0]


class Deployment:
    """A worker around scripted agents, and everything to look at it."""

    def __init__(
        self,
        num_ranks: int,
        config: dict[str, Any],
        script: dict[str, Any],
        traffic: Traffic | None = None,
    ) -> None:
        self.events = Events()
        self.segments_before = segments()
        command = [*SCRIPTED, "--script", json.dumps(script)]
        settings = AgentConfig(**{"start_timeout_s": START_S, **config})
        self.launcher = Launcher(
            command,
            settings,
            num_ranks=num_ranks,
            on_event=self.events,
            traffic=traffic,
            stop_grace_s=0.3,
        )
        self.worker = AgentWorker(
            self.launcher,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=64,
            block_size=16,
            vocab_size=NUM_LOGITS,
        )

    @property
    def pids(self) -> list[int]:
        return [int(str(agent["pid"])) for agent in self.worker.describe()]

    async def run(self, *token_ids: int, step_id: int = 1, **fields: Any) -> list[int]:
        async with asyncio.timeout(START_S):
            future = self.worker.submit(step(step_id, *token_ids, **fields))
            sampled: list[int] = (await future).token_ids.tolist()
            return sampled


def step(step_id: int, *token_ids: int, num_logprobs: int = 0, **fields: Any) -> StepInputs:
    """One row of one token per id, all sampling."""
    n = len(token_ids)
    rows, none = np.arange(n, dtype=np.int32), np.empty(0, np.int32)
    record = SamplingParams(num_logprobs=num_logprobs).record()
    arrays: dict[str, Any] = {
        "input_ids": np.array(token_ids, np.int32),
        "positions": rows,
        "slots": rows,
        "query_starts": np.arange(n + 1, dtype=np.int32),
        "context_lens": rows + np.int32(1),
        "block_tables": np.zeros((n, 4), np.int32),
        "sources": np.full(n, -1, np.int32),
        "adapter_ids": np.zeros(n, np.int32),
        "logit_positions": rows,
        "sampling": np.frombuffer(record * n, SAMPLING_DTYPE),
        "history_starts": np.zeros(n + 1, np.int32),
        "history_ids": none,
        "history_prompt_lens": np.zeros(n, np.int32),
        "bias_rows": none,
        "bias_ids": none,
        "bias_values": np.empty(0, np.float32),
        "wanted_logits": none,
    }
    return StepInputs(step_id, **{**arrays, **fields})


def sources(*samples: int) -> dict[str, Any]:
    return {"sources": np.array(samples, np.int32)}


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until that is so."""
    async with asyncio.timeout(START_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


def segments() -> set[str]:
    return {path.name for path in SHM.glob(f"llm-serving-{os.getuid()}-{os.getpid()}-*")}


def lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
