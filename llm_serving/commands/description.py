"""What is served, and how: the body of /info."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import msgspec

from llm_serving.config import ServingConfig
from llm_serving.model_card import ModelCard
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.protocol import Ready
from llm_serving.worker.agent_worker import AgentWorker

__all__ = ["fixed_facts", "moving_facts"]


def fixed_facts(
    config: ServingConfig,
    card: ModelCard,
    ready: Ready,
    lengths: tuple[int, int],
    why_not_native: str,
) -> dict[str, object]:
    """What stays as it was at the start.

    `lengths`: the context in tokens that is served, and what one request may use of it.
    `why_not_native`: why the native kernels do not run; empty if they do.
    """
    max_model_len, context = lengths
    dump_dir = config.precision.dump_dir
    return {
        "model_id": card.name,
        "served_names": list(config.model.names),
        "model_type": card.architecture,
        "model_digest": card.digest,
        "model_dtype": ready.dtype,
        "weights": card.weights_served,
        "prepared": card.key,
        "model_device_type": ready.device,
        "num_threads": ready.num_threads,
        "kernels": ready.kernels,
        "why_not_native": why_not_native or None,
        "max_model_len": max_model_len,
        "max_total_tokens": context,
        "num_kv_blocks": ready.num_blocks,
        "block_size": ready.block_size,
        "kv_dtype": ready.kv_dtype,
        "limits": msgspec.to_builtins(config.scheduler),
        "bare_decode_ms": {"context": ready.bare_context, "rows": ready.bare_decode_ms},
        "step_cost": msgspec.to_builtins(ready.step_cost),
        "versions": ready.versions,
        "version": version("llm-serving"),
        "task": 1 if dump_dir is None else 2,
    }


def moving_facts(
    worker: AgentWorker, dump: LogitsDump | None, phases_s: Mapping[str, float]
) -> dict[str, object]:
    """What may change while it serves."""
    return {
        "agents": worker.describe(),
        "precision": None if dump is None else _progress(dump),
        "start_phases_s": dict(phases_s),
    }


def _progress(dump: LogitsDump) -> dict[str, object]:
    return {
        "dump_dir": str(dump.folder.absolute()),
        "every": dump.every,
        "num_written": dump.num_written,
        "num_failed": dump.num_failed,
        "last_error": dump.last_error,
    }
