"""The agents of a deployment: the words they are started with, and the worker in front of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from llm_serving.commands.program import program
from llm_serving.config import ServingConfig
from llm_serving.model_card import ModelCard
from llm_serving.worker.agent_worker import AgentWorker
from llm_serving.worker.launcher import Launcher
from llm_serving.worker.traffic import Traffic

__all__ = ["make_launcher", "make_worker"]


def make_launcher(
    config: ServingConfig,
    card: ModelCard,
    max_model_len: int,
    *,
    on_event: Callable[[str], None],
    traffic: Traffic,
) -> Launcher:
    """`max_model_len` is the context in tokens that is served."""
    options = {
        "--card": pathlib.Path(card.tokenizer).with_name("card.json"),
        "--device": config.agent.device,
        "--max-model-len": max_model_len,
        "--block-size": config.kv_cache.block_size,
        "--num-blocks": config.kv_cache.num_blocks,
        "--kv-dtype": config.kv_cache.dtype,
        "--max-num-seqs": config.scheduler.max_num_seqs,
        "--max-num-batched-tokens": config.scheduler.max_num_batched_tokens,
        "--num-threads": config.agent.num_threads,
    }
    given = [
        str(word) for name, value in options.items() if value is not None for word in (name, value)
    ]
    command = [*program(), "agent", *given]
    return Launcher(command, config.agent, on_event=on_event, traffic=traffic)


def make_worker(
    config: ServingConfig, card: ModelCard, max_model_len: int, launcher: Launcher
) -> AgentWorker:
    return AgentWorker(
        launcher,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=config.kv_cache.block_size,
        num_slots=2 * config.scheduler.num_steps_in_flight - 1,
        vocab_size=card.config.vocab_size if config.precision.dump_dir else 0,
    )
