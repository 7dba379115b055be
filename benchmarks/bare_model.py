"""A prepared model in this process, its steps timed with nothing around them, and its limits.

For what `llm_serving.agent.bare_loop` does not do: steps of any shape at any context, at once, over
a cache that was filled beforehand (a page that was never written is the same page of zeros
everywhere, and costs nothing to read); and the time of each operation, beside what it needs.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from kernels_cpu import Limits, measure_limits

from llm_serving.agent.bare_loop import BLOCK_SIZE, step_inputs
from llm_serving.agent.kv_cache import KvCache, bytes_per_block
from llm_serving.agent.model_runner import DTYPES, ModelRunner
from llm_serving.generation import SamplingParams
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.packed_file import PackedFile
from llm_serving.model_card import ModelCard
from llm_serving.models.packed import NativePlan, load_packed
from llm_serving.prepare.cache import find_prepared

MODEL = "smollm2-135m-instruct"
OPERATIONS = ("norm", "qkv", "write", "attend", "out", "gate_up", "down", "head")
_LINEARS = {"qkv_proj": "qkv", "o_proj": "out", "gate_up_proj": "gate_up", "down_proj": "down"}
_LIMITS = {"bfloat16": "BF16", "float32": "F32"}  # of the attention, by dtype of the cache


def prepared_card(dtype: str = "auto", weights: str = "auto") -> ModelCard:
    card = find_prepared(MODEL, dtype, weights)
    if card is None or card.packed is None:
        flags = f"--dtype {dtype} --weights {weights}"
        sys.exit(f"prepare it first: llm-serving prepare {MODEL} {flags}")
    return card


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_rows` rows of `num_tokens` each, the last of which sees `context` tokens."""

    num_rows: int
    num_tokens: int
    context: int


@dataclass(frozen=True, slots=True)
class Need:
    """What an operation must read or write in memory, and compute with which instruction."""

    num_bytes: float = 0.0
    operations: float = 0.0
    format: str = "BF16"

    def ms(self, limits: Limits) -> float:
        return limits.seconds(self.format, int(self.num_bytes), self.operations) * 1e3


class BareModel:
    """As many rows and as much context as its cache, full of noise, holds."""

    def __init__(
        self,
        card: ModelCard,
        *,
        num_rows: int,
        context: int,
        num_threads: int,
        kv_dtype: str = "auto",
    ) -> None:
        self.card, self.config = card, card.config
        self._processors = os.sched_getaffinity(0)
        dtype = DTYPES[card.dtype] if kv_dtype == "auto" else torch.int8
        self._kernels = NativeKernels(num_threads)
        self._file = PackedFile(pathlib.Path(str(card.packed)))
        self._model = load_packed(self._file, card.config, self._kernels)
        self._width = -(-context // BLOCK_SIZE)
        cache = KvCache(card.config, num_rows * self._width, BLOCK_SIZE, dtype, torch.device("cpu"))
        _fill(cache.tensor)
        self.bytes_per_token = bytes_per_block(card.config, BLOCK_SIZE, dtype) // BLOCK_SIZE
        self._runner = ModelRunner(
            card,
            self._model,
            self._kernels,
            cache,
            max_model_len=context,
            max_num_seqs=num_rows,
            max_num_batched_tokens=max(num_rows, context),
        )
        self._runner.bind_thread()
        self._memory = np.ones(256 << 20, np.uint8)
        self._ids = np.random.default_rng(0).integers(0, card.config.vocab_size, 1 << 16, np.int32)

    def __enter__(self) -> BareModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.sched_setaffinity(0, self._processors)  # what starts now inherits that

    @property
    def isa(self) -> str:
        return str(self._kernels.kernels.isa)

    def limits(self) -> Limits:
        """Of this moment."""
        return measure_limits(self._kernels.kernels, self._kernels.pool, self._memory)

    def step_ms(
        self, shape: Shape, times: int, sampling: SamplingParams | None = None
    ) -> tuple[float, float]:
        """Median milliseconds of a whole step, and of its sampling."""
        self._plan.is_profiled = False
        spent = [self._run(shape, sampling or SamplingParams()) for _ in range(times + 1)][1:]
        return statistics.median(s[0] for s in spent), statistics.median(s[1] for s in spent)

    def operations_ms(self, shape: Shape, times: int) -> dict[str, float]:
        """Mean milliseconds of each operation, all layers together; `rest` is what is between."""
        self._run(shape, SamplingParams())
        self._plan.is_profiled = True
        self._plan.spent()
        steps = [self._run(shape, SamplingParams()) for _ in range(times)]
        self._plan.is_profiled = False
        found = {name: ms / times for name, ms in self._plan.spent().items()}
        found["sampling"] = statistics.mean(sampling for _, sampling in steps)
        found["rest"] = statistics.mean(step for step, _ in steps) - sum(found.values())
        return found

    def needs(self, shape: Shape) -> dict[str, Need]:
        """What the step needs: weights, keys and values once, and every multiply-add.

        After its keys and values the last layer follows only the tokens that are sampled, the last
        of each row, as the head does.
        """
        config, tokens = self.config, shape.num_rows * shape.num_tokens
        layers = config.num_hidden_layers
        followed = (tokens * (layers - 1) + shape.num_rows) / layers  # mean of the layers
        times = {"qkv": tokens, "head": shape.num_rows}
        found = {
            name: replace(need, operations=need.operations * times.get(name, followed))
            for name, need in self._linears().items()
        }
        before = shape.context - shape.num_tokens
        pairs = shape.num_tokens * before + shape.num_tokens * (shape.num_tokens + 1) / 2
        all_pairs = (layers - 1) * pairs + shape.context
        found["attend"] = Need(
            shape.num_rows * shape.context * self.bytes_per_token,
            4.0 * config.num_attention_heads * config.head_dim * all_pairs * shape.num_rows,
            _LIMITS[self.card.dtype],
        )
        found["write"] = Need(tokens * self.bytes_per_token)
        return found

    def _linears(self) -> dict[str, Need]:
        """Of one token, all layers together."""
        found: dict[str, Need] = {}
        for name, part in self._file.parts.items():
            if part.kind == "linear":
                key = "head" if name == "lm_head" else _LINEARS[name.rpartition(".")[2]]
                so_far = found.get(key, Need())
                found[key] = Need(
                    so_far.num_bytes + part.num_bytes,
                    so_far.operations + 2.0 * part.shape[0] * part.shape[1],
                    part.format,
                )
        return found

    @property
    def _plan(self) -> Any:
        """The extension module's own: see csrc/plan.hpp."""
        if not isinstance(self._model.plan, NativePlan):
            raise TypeError("a packed model on the native kernels has a native plan")
        return self._model.plan.native

    def _run(self, shape: Shape, sampling: SamplingParams) -> tuple[float, float]:
        size = shape.num_rows * shape.num_tokens
        inputs = step_inputs(
            self._ids[:size].reshape(shape.num_rows, -1),
            start=shape.context - shape.num_tokens,
            blocks_per_row=self._width,
            sampling=sampling,
        )
        began_ns = time.monotonic_ns()
        columns = self._runner.execute(inputs, _ignore_tick)
        ended_ns = time.monotonic_ns()
        return (ended_ns - began_ns) / 1e6, (columns.sampled_ns - columns.sample_ns) / 1e6


def _fill(cache: torch.Tensor) -> None:
    """With noise; of int8, whose tiles end with 16 scales each, bytes with like scales."""
    if cache.dtype is torch.int8:
        tile = torch.randint(-127, 128, (16 * cache.shape[-1],), dtype=torch.int8)
        tile[-64:].view(torch.float32).fill_(0.3 / 40)
        cache.view(-1, len(tile)).copy_(tile)
        return
    values, noise = cache.view(-1), (torch.randn(1 << 20) * 0.3).to(cache.dtype)
    for start in range(0, len(values), len(noise)):
        part = values[start : start + len(noise)]
        part.copy_(noise[: len(part)])


def _ignore_tick() -> None:
    pass
