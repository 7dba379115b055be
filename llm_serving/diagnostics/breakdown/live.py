"""Observing a running server: what it says before and after, and a load in between, or none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llm_serving.diagnostics.breakdown.load import Shape, check_shape, run_load, warm_up
from llm_serving.diagnostics.breakdown.metrics import Change
from llm_serving.diagnostics.breakdown.observation import Load, Observation
from llm_serving.diagnostics.breakdown.server import Server
from llm_serving.errors import ServingError

__all__ = ["is_busy", "measure", "watch"]

_WHOLE_RING = 4096
_SETTLE_S, _POLL_S = 2.0, 0.05  # after the last byte a request is still to be counted
_ENDED = "llm_serving:request_stage_seconds_count"


def watch(server: Server, seconds: float, sleep: Callable[[float], None]) -> Observation:
    """What happens by itself in so many seconds."""
    info, before, since_ns = server.info(), server.metrics(), server.trace(1).now_ns
    sleep(seconds)
    trace, after = server.trace(_WHOLE_RING), server.metrics()
    return Observation(trace, since_ns, seconds, server.url, info, before, after)


def measure(
    server: Server, shape: Shape, on_phase: Callable[[str], None], on_tokens: Callable[[int], None]
) -> Observation:
    """What a load of this shape meets with; `on_phase` hears of "warm up" and "load"."""
    info = server.info()
    check_shape(shape, info)
    model = _name(info)
    on_phase("warm up")
    warm_up(server, model, shape)
    before, since_ns = server.metrics(), server.trace(1).now_ns
    on_phase("load")
    began = time.monotonic()
    load = run_load(server, model, shape, on_tokens)
    seconds = time.monotonic() - began
    after = _settled(server, before, load)
    trace = server.trace(_WHOLE_RING)
    return Observation(trace, since_ns, seconds, server.url, info, before, after, load)


def is_busy(observation: Observation) -> bool:
    """Whether requests were running when it ended: a loop beside them would measure them, too."""
    return Change("", observation.after).now("vllm:num_requests_running") > 0


def _name(info: dict[str, Any]) -> str:
    names = info.get("served_names")
    if not isinstance(names, list) or not names:
        raise ServingError("/info names no served model: it is not a llm-serving of this release")
    return str(names[0])


def _settled(server: Server, before: str, load: Load) -> str:
    """/metrics, when all answers have been counted."""
    answered = sum(request.error is None for request in load.requests)
    deadline = time.monotonic() + _SETTLE_S
    while True:
        after = server.metrics()
        change = Change(before, after)
        is_counted = change.total(_ENDED, stage="send") >= answered or not change.knows(_ENDED)
        if (is_counted and not change.now("vllm:num_requests_running")) or (
            time.monotonic() >= deadline
        ):
            return after
        time.sleep(_POLL_S)
