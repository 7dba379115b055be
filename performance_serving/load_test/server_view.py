"""What does the server say of itself?  /info and /metrics, where it has them.

Neither is required: other servers (vLLM, llama.cpp) have no /info, and not all have /metrics.
What is missing is None here, and "not told by this server" in the report.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import aiohttp

from load_test.errors import NotUsable
from load_test.results import BareDecode, PrecisionDump, ServerWork, StepWork

__all__ = [
    "Metrics",
    "ServerView",
    "bare_decode_of",
    "context_of",
    "dump_between",
    "dump_of",
    "excerpt_of",
    "parse_metrics",
    "running_and_waiting",
    "work_between",
]

Metrics = dict[str, dict[str, float]]  # name -> value of its label "kind" ("" if none) -> sum

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_KIND = re.compile(r'(?:^|,)\s*kind="([^"]*)"')
_EXCERPT = (
    *("model_id", "served_names", "model_dtype", "weights", "kernels", "device", "num_threads"),
    *("max_model_len", "max_total_tokens", "limits", "version", "task", "precision"),
)
# of this server and vLLM, llama.cpp, TGI
_RUNNING = ("vllm:num_requests_running", "llamacpp:requests_processing", "tgi_batch_current_size")
_WAITING = ("vllm:num_requests_waiting", "llamacpp:requests_deferred", "tgi_queue_size")
_STEPS = "llm_serving:step_period_seconds"


class ServerView:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def info(self) -> dict[str, Any] | None:
        """/info; None if it has none.  Raises NotUsable if nobody answers at all."""
        try:
            return await self._json("/info")
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            reason = "no answer within 10 s" if isinstance(exc, TimeoutError) else str(exc)
            raise NotUsable(
                f"no server answers at {self._url}: {reason}; start it, or name it with --url or -P"
            ) from None

    async def context(self, info: dict[str, Any] | None) -> int | None:
        """The tokens that prompt and answer may have together, by /info or /v1/models."""
        if (context := context_of(info)) is not None:
            return context
        try:
            models = await self._json("/v1/models")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None
        entries = models.get("data") if models else None
        return context_of(entries[0]) if isinstance(entries, list) and entries else None

    async def metrics(self) -> Metrics | None:
        """/metrics; None if there is none, or no answer now."""
        try:
            async with self._session.get(self._url + "/metrics", timeout=_TIMEOUT) as answer:
                return parse_metrics(await answer.text()) if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None

    async def _json(self, path: str) -> dict[str, Any] | None:
        async with self._session.get(self._url + path, timeout=_TIMEOUT) as answer:
            body = await answer.read()
        try:
            value = json.loads(body) if answer.status == 200 else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


def parse_metrics(text: str) -> Metrics:
    """Prometheus' text format; series that differ in other labels than kind are added up."""
    made: Metrics = {}
    for line in text.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        name, labels, number = match.groups()
        try:
            value = float(number)
        except ValueError:
            continue
        if math.isfinite(value):
            kind = _KIND.search(labels or "")
            series = made.setdefault(name, {})
            key = kind.group(1) if kind else ""
            series[key] = series.get(key, 0.0) + value
    return made


def work_between(before: Metrics | None, after: Metrics | None) -> ServerWork | None:
    """What the counters have grown by; None for what is missing, or has been set back."""
    if before is None or after is None:
        return None

    def grown(name: str, kind: str = "") -> float | None:
        if (now := after.get(name, {}).get(kind)) is None:
            return None
        difference = now - before.get(name, {}).get(kind, 0.0)
        return difference if difference >= 0 else None

    steps: dict[str, StepWork] = {}
    for kind in after.get(f"{_STEPS}_count", {}):
        count, period_s = grown(f"{_STEPS}_count", kind), grown(f"{_STEPS}_sum", kind)
        if count is not None and period_s is not None:
            rows = grown("llm_serving:step_rows_total", kind)
            tokens = grown("llm_serving:step_tokens_total", kind)
            steps[kind] = StepWork(count, period_s, rows, tokens)
    return ServerWork(
        prompt_tokens=grown("vllm:prompt_tokens_total"),
        generation_tokens=grown("vllm:generation_tokens_total"),
        prefix_queries=grown("vllm:prefix_cache_queries_total"),
        prefix_hits=grown("vllm:prefix_cache_hits_total"),
        preemptions=grown("vllm:num_preemptions_total"),
        steps=steps,
    )


def context_of(value: dict[str, Any] | None) -> int | None:
    for name in ("max_total_tokens", "max_model_len"):
        if isinstance(value, dict) and isinstance(size := value.get(name), int) and size > 0:
            return size
    return None


def excerpt_of(info: dict[str, Any] | None) -> dict[str, Any] | None:
    """The part of /info that says what was measured."""
    return None if info is None else {key: info[key] for key in _EXCERPT if key in info}


def bare_decode_of(info: dict[str, Any] | None) -> BareDecode | None:
    told = info.get("bare_decode_ms") if info else None
    try:
        rows = {int(n): float(ms) for n, ms in told["rows"].items()} if told else {}
        return BareDecode(int(told["context"]), rows) if told and rows else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def dump_of(info: dict[str, Any] | None) -> dict[str, Any] | None:
    """What /info says of the precision dump; None if the server dumps nothing."""
    told = info.get("precision") if info else None
    return told if isinstance(told, dict) else None


def dump_between(before: dict[str, Any], after: dict[str, Any] | None) -> PrecisionDump | None:
    """The files that came in between; None if the server no longer tells."""
    if after is None:
        return None

    def grown(name: str) -> int:
        return int(after.get(name) or 0) - int(before.get(name) or 0)

    folder, error = str(after.get("dump_dir", "?")), after.get("last_error")
    failed = grown("num_failed")
    return PrecisionDump(
        folder, grown("num_written"), failed, str(error) if error and failed else None
    )


def running_and_waiting(metrics: Metrics | None) -> tuple[float | None, float | None]:
    """Requests in a step and in the queue; None: not told."""

    def first_of(names: tuple[str, ...]) -> float | None:
        values = ((metrics or {}).get(name, {}).get("") for name in names)
        return next((value for value in values if value is not None), None)

    return first_of(_RUNNING), first_of(_WAITING)
