"""What a server writes down about itself while it serves, if it is told to.

agent.transport_log    one line for every call to an agent
precision.dump_dir     the logits of chosen positions, for `acc_allclose.py`
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from llm_serving.config import AgentConfig, PrecisionConfig
from llm_serving.model_card import ModelCard
from llm_serving.precision.logits_dump import LogitsDump
from llm_serving.protocol import Ready
from llm_serving.transport.call_log import CallLog

__all__ = ["logits_dump", "transport_log"]


@contextlib.contextmanager
def transport_log(config: AgentConfig, on_event: Callable[[str], None]) -> Iterator[CallLog | None]:
    """The log, closed with how the block ended.  Raises ConfigError if it cannot be written."""
    if config.transport_log is None:
        yield None
        return
    with CallLog(
        pathlib.Path(config.transport_log),
        transport=f"{config.transport}+shm",
        methods=config.transport_log_methods,
        on_failure=on_event,
    ) as log:
        yield log


def dump_labels(card: ModelCard, ready: Ready) -> dict[str, str]:
    """What the manifest says of all logits of a server."""
    cache = "" if ready.kv_dtype in ("", ready.dtype) else f", {ready.kv_dtype} cache"
    return {
        "model": card.name,
        "model_digest": card.digest,
        "dtype": ready.dtype,
        "weights": card.weights_served + cache,
        "kernels": "+".join(sorted(set(ready.kernels.values()))),
        "source": "server",
    }


@contextlib.contextmanager
def logits_dump(
    config: PrecisionConfig, card: ModelCard, ready: Ready
) -> Iterator[LogitsDump | None]:
    """The dump; at the end everything that was taken is on the disk."""
    if config.dump_dir is None:
        yield None
        return
    dump = LogitsDump(
        pathlib.Path(config.dump_dir), every=config.every, labels=dump_labels(card, ready)
    )
    try:
        yield dump
    finally:
        dump.close()
