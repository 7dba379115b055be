"""One step from arrays to sampled tokens: the model, its KV bytes and the sampler in one hand.

It keeps no request: only weights, KV bytes and the ids it sampled last, for the rows of the next
step that take their input from there.  Calls are synchronous, one at a time, from one thread.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_serving.agent.bare_steps import time_bare_steps
from llm_serving.agent.kv_cache import KvCache, bytes_per_block, default_num_blocks
from llm_serving.agent.memory import available_memory
from llm_serving.agent.native_sampler import NativeSampler
from llm_serving.agent.sampler import SampledColumns, Sampler
from llm_serving.agent.step_check import StepLimits, check_step
from llm_serving.agent.warm_up import warm_up_steps
from llm_serving.errors import ChannelError, ConfigError
from llm_serving.kernels.cpu.backend import NativeKernels
from llm_serving.kernels.cpu.packed_file import PackedFile
from llm_serving.kernels.interface import Kernels
from llm_serving.kernels.selection import select_device, select_kernels
from llm_serving.model_card import CARD_VERSION, ModelCard
from llm_serving.models.attention_metadata import MetadataBuilder
from llm_serving.models.checkpoint import load_weights
from llm_serving.models.layers import PlainLinears, StepContext
from llm_serving.models.llama import LlamaModel
from llm_serving.models.packed import NativePlan, NativeSteps, load_packed
from llm_serving.models.rope import rotary_table
from llm_serving.step_arrays import StepInputs
from llm_serving.step_cost import StepCost

__all__ = ["ModelRunner", "StepColumns"]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
TOKENS_PER_TICK = 2048  # a native plan runs so many layers times tokens in one call
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The columns of a `StepResult`, and when its parts began or ended (time.monotonic_ns)."""

    token_ids: Ints
    logprobs: Floats
    top_ids: Ints
    top_logprobs: Floats
    finite: npt.NDArray[np.bool_]
    logits: Floats
    forward_ns: int
    sample_ns: int
    sampled_ns: int


class ModelRunner:
    def __init__(
        self,
        card: ModelCard,
        model: LlamaModel,
        kernels: Kernels,
        cache: KvCache,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        device = cache.tensor.device
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size
        self.vocab_size = card.config.vocab_size
        self.dtype = str(card.dtype)
        self.kv_dtype = str(cache.tensor.dtype).removeprefix("torch.")
        self.device = str(device)
        self.kernels = kernels.backends()
        self._kernels = kernels
        self._model = model
        self._device = device
        self._num_layers = card.config.num_hidden_layers
        table = rotary_table(card.config, max_model_len, device)
        self._steps: MetadataBuilder | NativeSteps
        self._tokens_per_tick = 1
        if isinstance(kernels, NativeKernels):
            caches, size = cache.layers, cache.block_size
            plan = NativePlan(model, card.config, kernels, table, caches, size)
            model.plan = plan
            self._steps = NativeSteps(kernels, plan, table, caches, size)
            self._tokens_per_tick = TOKENS_PER_TICK
        else:
            self._steps = MetadataBuilder(
                kernels, table, cache.layers, cache.block_size, DTYPES[card.dtype]
            )
        self._sampler: Sampler | NativeSampler
        self._native: tuple[NativePlan, NativeSampler] | None = None
        if isinstance(kernels, NativeKernels):
            self._sampler = NativeSampler(kernels, self.vocab_size, max_num_seqs)
            if plan.has_head:
                self._native = plan, self._sampler
        else:
            self._sampler = Sampler(self.vocab_size, max_num_seqs)
        self._limits = StepLimits(
            self.vocab_size, max_model_len, cache.num_blocks, cache.block_size
        )
        self._cache = cache
        self._no_logits = np.empty((0, self.vocab_size), np.float32)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._last_step_id: int | None = None
        self._last_ids = np.empty(0, np.int32)
        self.bare_context, self.bare_decode_ms = 0, dict[int, float]()
        self.step_cost: StepCost | None = None

    @classmethod
    def load(
        cls,
        card: ModelCard,
        *,
        device: str,
        max_model_len: int,
        block_size: int,
        num_blocks: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_threads: int,
        phase: Callable[[str], None],
        kv_dtype: str = "auto",
    ) -> ModelRunner:
        """A warm runner.  `num_blocks` None: from the memory that is there.

        `kv_dtype`: auto (the card's dtype), or int8, which the native kernels alone have.

        `phase` is called with a name as each part of the work begins.  Raises ConfigError, naming
        the field, tensor or file, for a model that cannot be served so.
        """
        _check_card(card, max_model_len)
        torch.set_num_threads(num_threads)
        where = select_device(device)
        kernels = select_kernels(where, num_threads if card.packed else None)
        cache_dtype = _cache_dtype(kv_dtype, card, kernels)
        phase("read weights")
        model = _read_model(card, kernels, where)
        phase("allocate KV cache")
        block_bytes = bytes_per_block(card.config, block_size, cache_dtype)
        blocks = num_blocks or default_num_blocks(
            block_bytes,
            available_bytes=available_memory(where),
            on_cpu=where.type == "cpu",
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
        )
        cache = KvCache(card.config, blocks, block_size, cache_dtype, where)
        runner = cls(
            card,
            model,
            kernels,
            cache,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        phase("warm up")
        runner.warm_up()
        phase("time the bare model")
        runner.time_bare_steps()
        if isinstance(kernels, NativeKernels):
            cache.take_pages_ahead(kernels.module)
        return runner

    def bind_thread(self) -> None:
        """Where threads take every processor, keep the calling one, which runs the steps, on one.

        For a process of its own: `serve` and the bare loop's command have one.
        """
        if isinstance(self._kernels, NativeKernels):
            self._kernels.bind_caller()

    def warm_up(self) -> None:
        """Run steps of typical shapes, so that no request pays for what happens only once.

        They leave keys and values that nobody reads and no last step.  `load` has called it.
        """
        for inputs in warm_up_steps(self._limits, self._max_num_seqs, self._max_num_batched_tokens):
            self._execute_alone(inputs)

    def time_bare_steps(self) -> None:
        """Find `bare_decode_ms` at `bare_context`, and `step_cost`: this model on an idle machine.

        `load` has called it.
        """
        bare = time_bare_steps(
            self._execute_alone, self._limits, self._max_num_seqs, self._max_num_batched_tokens
        )
        self.bare_context, self.bare_decode_ms = bare.context, bare.decode_ms
        self.step_cost = bare.cost

    def _execute_alone(self, inputs: StepInputs) -> None:
        self.execute(inputs, _ignore_tick)
        self._last_step_id, self._last_ids = None, np.empty(0, np.int32)

    def execute(self, inputs: StepInputs, tick: Callable[[], None]) -> StepColumns:
        """Run the model over a step's rows and sample; `tick` is called after each layer.

        The arrays may be read-only and are not looked at afterwards.  Raises ChannelError for
        arrays that do not fit together, and for `sources` unless the step before was the last one
        that finished here.
        """
        check_step(inputs, self._limits)
        ids = self._input_ids(inputs)
        with torch.inference_mode(), self._cache.writing(int(inputs.slots.max(initial=-1))):
            step = self._begin(inputs)
            forward_ns = time.monotonic_ns()
            hidden = self._run_layers(ids, step, tick)
            if self._native is None:
                logits = self._logits(hidden, inputs.logit_positions)
                sample_ns = time.monotonic_ns()
                wanted = self._wanted(logits, inputs)
                sampled = self._sampler.sample(logits, inputs, self._last_ids)
            else:
                wanted, sample_ns, sampled = self._sample_natively(*self._native, hidden, inputs)
            sampled_ns = time.monotonic_ns()
        self._last_step_id, self._last_ids = inputs.step_id, sampled.token_ids
        return StepColumns(
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            top_ids=sampled.top_ids,
            top_logprobs=sampled.top_logprobs,
            finite=sampled.finite,
            logits=wanted,
            forward_ns=forward_ns,
            sample_ns=sample_ns,
            sampled_ns=sampled_ns,
        )

    def keeps_logits(self, inputs: StepInputs) -> bool:
        """Whether a step's logits are written to memory: not if what they amount to is enough."""
        return self._native is None or self._native[1].needs_logits(inputs)

    def _begin(self, inputs: StepInputs) -> StepContext:
        rows = (inputs.query_starts, inputs.context_lens, inputs.block_tables)
        if isinstance(self._steps, NativeSteps):
            return self._steps.build(inputs.positions, inputs.slots, *rows, inputs.logit_positions)
        return self._steps.build(inputs.positions, inputs.slots, *rows)

    def _sample_natively(
        self, plan: NativePlan, sampler: NativeSampler, hidden: torch.Tensor, inputs: StepInputs
    ) -> tuple[Floats, int, SampledColumns]:
        """The head says what each row of logits amounts to; often nobody asks for more."""
        rows, logits = inputs.logit_positions, None
        if self.keeps_logits(inputs):
            logits = torch.empty(len(rows), self.vocab_size)
        digest = plan.head(hidden, rows, logits, inputs.sampling)
        sample_ns = time.monotonic_ns()
        # copied by numpy: torch would set threads of its own spinning beside the pool's
        wanted = self._no_logits if logits is None else logits.numpy()[inputs.wanted_logits]
        return wanted, sample_ns, sampler.sample(logits, inputs, self._last_ids, digest)

    def _wanted(self, logits: torch.Tensor, inputs: StepInputs) -> Floats:
        """Copies of the rows that somebody wants to see, before the sampler changes them."""
        if not len(inputs.wanted_logits):
            return self._no_logits
        rows = logits.index_select(0, self._tensor(inputs.wanted_logits.astype(np.int64)))
        found: Floats = rows.float().cpu().numpy()
        return found

    def _run_layers(
        self, ids: npt.NDArray[np.int64], step: StepContext, tick: Callable[[], None]
    ) -> torch.Tensor:
        """What the last layer gives, [num_tokens, hidden_size]."""
        hidden = self._model.embed(self._tensor(ids))
        at_once = max(1, self._tokens_per_tick // len(ids))
        for first in range(0, self._num_layers, at_once):
            last = min(first + at_once, self._num_layers)
            hidden = self._model.run_layers(hidden, step, first, last)
            tick()
        return hidden

    def _logits(self, hidden: torch.Tensor, logit_positions: Ints) -> torch.Tensor:
        """Those of the sampling rows, float32 [num_samples, vocab]."""
        sampling = self._tensor(logit_positions.astype(np.int64))
        return self._model.logits(hidden.index_select(0, sampling))

    def _input_ids(self, inputs: StepInputs) -> npt.NDArray[np.int64]:
        """The ids to compute, those that the last step sampled put in."""
        ids = inputs.input_ids.astype(np.int64)
        is_taken = inputs.sources >= 0
        if is_taken.any():
            sources = inputs.sources[is_taken]
            if self._last_step_id != inputs.step_id - 1:
                raise _lost_step(inputs.step_id)
            if sources.max() >= len(self._last_ids):
                raise ChannelError("sources: the last step had fewer samples")
            ids[inputs.query_starts[:-1][is_taken]] = self._last_ids[sources]
        return ids

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _check_card(card: ModelCard, max_model_len: int) -> None:
    config = card.config
    if card.version != CARD_VERSION:
        raise ConfigError(
            f"version: the card is of version {card.version}, this release reads {CARD_VERSION}; "
            "prepare the model again"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads: {config.num_key_value_heads} does not divide "
            f"num_attention_heads, {config.num_attention_heads}"
        )
    if config.sliding_window is not None and max_model_len > config.sliding_window:
        raise ConfigError(
            f"sliding_window: served only up to {config.sliding_window} tokens, "
            f"where it changes nothing; max_model_len is {max_model_len}"
        )
    if max_model_len > config.longest_context:
        raise ConfigError(
            f"max_model_len: {max_model_len} is more than the model's {config.longest_context} "
            "(max_position_embeddings, stretched by rope_scaling)"
        )


def _cache_dtype(kv_dtype: str, card: ModelCard, kernels: Kernels) -> torch.dtype:
    if kv_dtype not in ("auto", "int8"):
        raise ConfigError(f"kv_cache.dtype: expected one of auto, int8, found {kv_dtype!r:.40}")
    if kv_dtype == "auto":
        return DTYPES[card.dtype]
    if not isinstance(kernels, NativeKernels):
        raise ConfigError("kv_cache.dtype: int8 needs the native kernels, but the reference runs")
    return torch.int8


def _read_model(card: ModelCard, kernels: Kernels, device: torch.device) -> LlamaModel:
    if card.packed is not None:
        if not isinstance(kernels, NativeKernels):
            raise ConfigError(f"weights: {card.name} is packed for the native kernels")
        return load_packed(PackedFile(pathlib.Path(card.packed)), card.config, kernels)
    dtype = DTYPES[card.dtype]
    linears = PlainLinears(kernels, dtype, device)
    model = LlamaModel(card.config, linears, kernels, dtype, device)
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    load_weights(
        card.weights, model.tensors(), tied=tied if card.config.tie_word_embeddings else {}
    )
    return model


def _lost_step(step_id: int) -> ChannelError:
    return ChannelError(f"step {step_id} needs the samples of step {step_id - 1}, not the last one")


def _ignore_tick() -> None:
    pass
