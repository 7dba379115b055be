"""Results of load tests made by hand: every time in them is chosen, so figures can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from load_test.results import RequestError, RequestRecord, Run

__all__ = ["failed", "request", "run_of"]


def request(
    index: int,
    scheduled_s: float,
    token_s: Sequence[float],
    *,
    sent_s: float | None = None,
    end_s: float | None = None,
    **more: Any,
) -> RequestRecord:
    """One that ended well with its last token, if nothing else is said."""
    values: dict[str, Any] = {
        "dataset_index": index,
        "prompt_digest": f"digest {index}",
        "asked_tokens": len(token_s),
        "output_tokens": len(token_s),
        "prompt_tokens": 10,
        "status": 200,
        "finish_reason": "length",
    } | more
    return RequestRecord(
        index=index,
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        token_s=list(token_s),
        end_s=token_s[-1] if end_s is None and token_s else end_s,
        **values,
    )


def failed(index: int, scheduled_s: float, kind: str = "reset") -> RequestRecord:
    """Lost half a second after it was due, without a token."""
    error = RequestError(kind, "it broke")
    return request(index, scheduled_s, [], end_s=scheduled_s + 0.5, error=error, prompt_tokens=None)


def run_of(*requests: RequestRecord, **more: Any) -> Run:
    values: dict[str, Any] = {"options": {}, "num_planned": len(requests)} | more
    return Run(
        task=1,
        url="http://127.0.0.1:8835",
        api="tgi",
        model="llama2",
        started="2025-07-23T14:05:00+02:00",
        requests=list(requests),
        **values,
    )
